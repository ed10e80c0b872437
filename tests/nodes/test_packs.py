"""Living with other packs: their lists, and what they show of our samples."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui import COMFYUI, PACK
from families import Family
from stock import stock
from toys import apply, guided, k_sample, predictor, train

# A pack that copies ComfyUI's lists into an input and into a type of output, as older packs do.
COPIES = """
import comfy.samplers


class {name}:
    SAMPLERS, SCHEDULERS = list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)
    RETURN_TYPES = (SAMPLERS, SCHEDULERS)
    FUNCTION, CATEGORY, OUTPUT_NODE = "run", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"sampler_name": (cls.SAMPLERS,), "scheduler": (cls.SCHEDULERS,)}}}}

    def run(self, sampler_name, scheduler):
        return sampler_name, scheduler


NODE_CLASS_MAPPINGS = {{"{name}": {name}}}
"""
# What ComfyUI says to graphs: a choice in each pack's own node, and a link from it to KSampler.
ASK = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, execution

async def main():
    for place in sys.argv[2:]:
        assert await nodes.load_custom_node(place), place
    answers = {}
    for name in ("Before", "After"):
        for sampler, scheduler in (("euler", "normal"), ("amed_multistep", "amed")):
            graph = {"pack": {"class_type": name, "inputs": {"sampler_name": sampler, "scheduler": scheduler}}}
            answers[f"{name} {sampler}"] = (await execution.validate_prompt("0", graph, None))[0]
        linked = {"pack": {"class_type": name, "inputs": {"sampler_name": "euler", "scheduler": "normal"}}}
        linked["demo"] = {"class_type": "AMEDDemoModel", "inputs": {"digit": "0", "batch_size": 1}}
        inputs = {"seed": 0, "steps": 1, "cfg": 1.0, "denoise": 1.0}
        inputs |= {"sampler_name": ["pack", 0], "scheduler": ["pack", 1]}
        inputs |= {"model": ["demo", 0], "positive": ["demo", 1], "negative": ["demo", 2], "latent_image": ["demo", 3]}
        linked["sample"] = {"class_type": "KSampler", "inputs": inputs}
        linked["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "x"}}
        found = await execution.validate_prompt("0", linked, None)
        answers[f"{name} link"] = "save" in found[2] and not found[3]
    print("ANSWERS", json.dumps(answers))

asyncio.run(main())
"""


@pytest.mark.trust("registration")
@pytest.mark.parametrize("left_alone", [False, True])
def test_packs_that_copy_the_lists_before_and_after_ours(tmp_path: Path, left_alone: bool) -> None:
    """A copy made before ours lacks our names, so that its links to KSampler break; left alone, the lists are equal."""
    for name in ("Before", "After"):
        (tmp_path / f"{name}.py").write_text(COPIES.format(name=name))
    order = [str(tmp_path / "Before.py"), str(PACK), str(tmp_path / "After.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AMED_LEAVE_LISTS": "1" if left_alone else ""}
    command = [sys.executable, "-c", ASK, str(COMFYUI), *order]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=COMFYUI, check=False)
    assert "ANSWERS" in done.stdout, done.stdout + done.stderr
    answers = json.loads(done.stdout.split("ANSWERS", 1)[1])
    usual = {f"{name} {what}": True for name in ("Before", "After") for what in ("euler", "link")}
    ours = {"Before amed_multistep": False, "After amed_multistep": not left_alone}
    assert answers == usual | ours | ({} if left_alone else {"Before link": False})


@pytest.mark.trust("registration")
def test_names_are_added_in_place_and_once(pack: Any) -> None:
    import comfy.samplers  # noqa: PLC0415

    lists = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES
    before = [list(names) for names in lists]
    assert pack.nodes.registration.add_names() == []
    assert [list(names) for names in lists] == before
    assert comfy.samplers.KSampler.SAMPLERS is comfy.samplers.SAMPLER_NAMES
    assert comfy.samplers.KSampler.SCHEDULERS is comfy.samplers.SCHEDULER_NAMES
    for names, ours in zip(lists, (list(pack.amed_core.samplers.NAMES), ["amed"]), strict=True):
        assert [name for name in names if name in ours] == ours, "each once, in our order"
        assert names[-len(ours) :] == ours, "after everybody else's"


# What is shown of a sample


@pytest.fixture(scope="module")
def multistep(pack: Any, flux: Family) -> Any:
    return train(pack, flux, trajectories=4, held_out=2)[0]


def custom(pack: Any, family: Family, made: Any, latent: Any = None, sigmas: Any = None) -> tuple[torch.Tensor, ...]:
    """Both outputs of SamplerCustomAdvanced."""
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    if sigmas is None:
        (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    noise = stock("RandomNoise", noise_seed=3)[0]
    with torch.inference_mode():
        found = stock(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guided(family),
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent or family.latent,
        )
    return found[0]["samples"], found[1]["samples"]


@pytest.mark.parametrize("student", ["amed", "amed_ipndm", "amed_dpmpp_2m", "amed_multistep"])
@pytest.mark.parametrize("masked", [False, True])
def test_denoised_output_is_output_where_the_run_ends_at_0(
    pack: Any, flux: Family, multistep: Any, student: str, masked: bool
) -> None:
    """Many graphs decode denoised_output."""
    made = multistep if student == "amed_multistep" else predictor(pack, flux, student, guidance=3.0)
    latent = dict(flux.latent)
    if masked:
        mask = torch.zeros(1, 1, *latent["samples"].shape[-2:])
        mask[..., :8] = 1.0
        latent |= {"samples": torch.randn(latent["samples"].shape), "noise_mask": mask}
    output, denoised = custom(pack, flux, made, latent)
    torch.testing.assert_close(denoised, output, rtol=0, atol=0)


def test_above_0_the_denoised_output_is_the_models_own(pack: Any, flux: Family, multistep: Any) -> None:
    (sigmas,) = pack.nodes.AMEDScheduler.execute(multistep, 1.0).args
    output, denoised = custom(pack, flux, multistep, sigmas=sigmas[:-1])
    assert not torch.allclose(denoised, output, rtol=1e-2)


@pytest.mark.trust("precision")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("student", ["amed", "amed_ipndm", "amed_multistep"])
def test_sigmas_in_half_precision_are_the_own_grid(
    pack: Any, flux: Family, multistep: Any, student: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    made = multistep if student == "amed_multistep" else predictor(pack, flux, student, guidance=3.0)
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    rounded, exact = (custom(pack, flux, made, sigmas=s)[0] for s in (sigmas.to(dtype), sigmas))
    assert "noise levels are not the ones" not in caplog.text
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.std()
    assert k_sample(flux, apply(pack, flux, made), 5, 3.0, student).isfinite().all()
