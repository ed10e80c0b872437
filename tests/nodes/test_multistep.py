"""The learned multistep student through the nodes: trained in one click, used everywhere, never silently misused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make
from stock import stock
from toys import apply, dual_cfg, flat, guided, heard, inside, k_sample, train

from amed_core import evaluate

STUDENT, CFG, STEPS = "amed_multistep", 3.0, 4
SHORT = {"steps": STEPS, "teacher_calls": 8, "trajectories": 1, "held_out": 1}


@pytest.fixture(scope="module")
def made(pack: Any, flux: Family) -> Any:
    return train(pack, flux, **SHORT)[0]


@pytest.fixture(scope="module")
def applied(pack: Any, flux: Family, made: Any) -> Any:
    return apply(pack, flux, made)


def levels(pack: Any, made: Any, denoise: float = 1.0) -> torch.Tensor:
    """What AMEDScheduler gives."""
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, denoise).args
    return sigmas


def custom(family: Family, model: Any, sampler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """What SamplerCustom gives for seed 3."""
    how = {"noise_seed": 3, "cfg": CFG, "sampler": sampler, "sigmas": sigmas}
    given = {"positive": family.positive, "negative": family.negative, "latent_image": family.latent}
    with torch.inference_mode():
        samples: torch.Tensor = stock("SamplerCustom", model=model, **how, **given)[0]["samples"]
    return samples


@pytest.mark.parametrize("name", ["wan21", "stable_audio", "flux2", "cogvideox", "ltxav"])
def test_it_is_what_one_click_trains_and_no_worse_than_the_best_unlearned_solver(pack: Any, name: str) -> None:
    family = make(name)
    made, losses, report, _ = train(pack, family, **SHORT)
    config, training = made.config, made.notes["training"]
    assert config.kind == "multistep"
    assert len(config.sigmas) == STEPS + 1
    assert training["error"] <= training["baseline_error"]
    of_iterations = training["iterations"] + 1
    assert len(losses["loss"]) in (of_iterations, of_iterations + 1)  # the last where the energy of bands is kept
    assert f"choose sampler {STUDENT}, scheduler amed, steps {STEPS}, cfg 3" in report
    drawn = k_sample(family, apply(pack, family, made), STEPS, CFG, STUDENT)
    assert drawn.isfinite().all()
    assert drawn.shape == flat(family.latent["samples"]).shape


def test_k_sampler_custom_sampling_and_a_file_give_the_same_picture(
    pack: Any, flux: Family, made: Any, applied: Any, tmp_path: Path
) -> None:
    asked: list[float] = []

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        asked.append(float(parameters["timestep"].max()))
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    counted = applied.clone()
    counted.set_model_unet_function_wrapper(wrapper)
    drawn = k_sample(flux, counted, STEPS, CFG, STUDENT)
    assert len(asked) == STEPS
    assert asked == sorted(asked, reverse=True)
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    assert (custom(flux, flux.model, sampler, levels(pack, made)) == drawn).all()
    files = pack.amed_core.files
    files.save_predictor(made.predictor, tmp_path / "p.safetensors", dict(made.notes))
    loaded = pack.nodes.values.NotedPredictor(files.load_predictor(tmp_path / "p.safetensors"))
    assert (k_sample(flux, apply(pack, flux, loaded), STEPS, CFG, STUDENT) == drawn).all()


def test_on_other_levels_it_learns(pack: Any, flux: Family, made: Any, user: Path) -> None:
    asked: list[Any] = []
    applied = apply(pack, flux, made, heard(flux.model, asked.append))
    own = levels(pack, made)
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    runs = {
        "another scheduler": (STEPS, lambda: k_sample(flux, applied, STEPS, CFG, STUDENT, "karras")),
        "another number of steps": (STEPS + 1, lambda: k_sample(flux, applied, STEPS + 1, CFG, STUDENT)),
        "an image": (STEPS, lambda: custom(flux, applied, sampler, levels(pack, made, 0.5))),
        "its second part": (2, lambda: custom(flux, applied, sampler, own[2:])),
    }
    for number, (what, (calls, run)) in enumerate(runs.items(), start=1):
        for first in (True, False):
            asked.clear()
            assert run().isfinite().all()
            assert len(asked) > 24 if first else len(asked) == calls, what
        assert len(list((user.parent / "amed_learned").glob("*"))) == number, what


def test_on_other_levels_where_it_must_not_learn_it_is_comfyuis_ipndm_and_says_so(
    pack: Any, flux: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.samplers  # noqa: PLC0415

    (never,) = pack.nodes.AMEDLearn.execute(flux.model, "never", 4, 24, False).args
    applied = apply(pack, flux, made, never)
    (ours,), theirs = pack.nodes.AMEDSampler.execute(made).args, comfy.samplers.sampler_object("ipndm")
    own = levels(pack, made)
    karras = k_sample(flux, applied, STEPS, CFG, STUDENT, "karras")
    assert "all 4 calls are plain ones" in caplog.text
    torch.testing.assert_close(karras, k_sample(flux, applied, STEPS, CFG, "ipndm", "karras"), rtol=1e-3, atol=1e-4)
    for sigmas in (levels(pack, made, 0.5), own[2:]):
        caplog.clear()
        drawn = custom(flux, applied, ours, sigmas)
        assert "These noise levels are not the ones" in caplog.text
        torch.testing.assert_close(drawn, custom(flux, applied, theirs, sigmas), rtol=1e-3, atol=1e-4)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        k_sample(flux, applied, STEPS, CFG, STUDENT)
    assert "not the ones" not in caplog.text, "on its own grid there is nothing to say"


def test_its_first_steps_are_its_own_when_the_run_is_cut(pack: Any, flux: Family, made: Any) -> None:
    """As KSamplerAdvanced and SplitSigmas cut it: the state after two steps is the one that the whole run passes."""
    import comfy.samplers  # noqa: PLC0415

    own, passed = levels(pack, made), []
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    guider = comfy.samplers.CFGGuider(flux.model)
    guider.set_conds(flux.positive, flux.negative)
    guider.set_cfg(CFG)
    noise, empty = torch.randn(flux.latent["samples"].shape), torch.zeros(flux.latent["samples"].shape)
    with torch.inference_mode():
        half = guider.sample(noise, empty, sampler, own[:3], disable_pbar=True, seed=3)
        guider.sample(
            noise, empty, sampler, own, callback=lambda i, d, x, n: passed.append(x), disable_pbar=True, seed=3
        )
    sigma = float(own[2])
    state = guider.model_patcher.model.process_latent_in(half) * (1 - sigma)  # ComfyUI scales what it hands out
    torch.testing.assert_close(state, passed[2], rtol=1e-3, atol=1e-4)


def test_a_range_of_cfg_shares_the_grid(pack: Any, flux: Family) -> None:
    made = train(pack, flux, **SHORT, cfg=2.0, cfg_max=6.0)[0]
    network = made.predictor
    assert network.config.guidances == (2.0, 4.0, 6.0)
    assert network.weights.shape[0] == 3
    applied = apply(pack, flux, made)
    drawn = {scale: k_sample(flux, applied, STEPS, scale, STUDENT) for scale in (2.0, 3.0)}
    assert all(picture.isfinite().all() for picture in drawn.values())
    assert not torch.equal(drawn[2.0], drawn[3.0])


# Guidance


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize("batched", [True, False])
def test_what_guidance_adds_is_what_another_cfg_changes(pack: Any, name: str, batched: bool) -> None:
    """Whether ComfyUI puts both prompts into one batch or, as with little memory, calls the model twice."""
    family = make(name)
    negative = family.negative if batched else [[torch.randn(1, 13, family.negative[0][0].shape[-1]), {}]]
    if not batched:
        negative[0][1].update(family.negative[0][1])

    def answers(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> Any:
        guider = pack.nodes.bridge.guider_of(model)
        assert pack.nodes.bridge.shows_guidance(guider)
        denoiser = pack.nodes.bridge.ComfyDenoiser(model, extra_args, [0.7, 0.0], bottleneck=False, guidance=2.0)
        return evaluate(denoiser, x * sigmas[0], sigmas[0])

    one, other, none = (inside(guided(family, cfg=cfg, negative=negative), family, answers) for cfg in (2.0, 5.0, 1.0))
    torch.testing.assert_close(other.denoised - one.denoised, 3 * one.guidance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.guidance, 4 * one.guidance, rtol=1e-3, atol=1e-4)  # adds 4 times as much
    assert (none.guidance == 0).all()


def test_it_steps_along_what_guidance_adds(pack: Any, flux: Family, made: Any) -> None:
    assert made.config.guided
    without = train(pack, flux, **SHORT, cfg=1.0)[0]
    assert not without.config.guided
    assert not train(pack, flux, **SHORT, cfg=1.0, cfg_max=3.0)[0].config.guided


def test_where_guidance_is_not_to_be_seen_all_calls_are_plain_and_it_says_so(
    pack: Any, flux: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.samplers  # noqa: PLC0415

    def guider() -> Any:
        return dual_cfg(flux, flux.negative)

    (ours,), theirs = pack.nodes.AMEDSampler.execute(made).args, comfy.samplers.sampler_object("ipndm")
    noise = torch.randn(flux.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    empty, drawn = torch.zeros_like(noise), []
    for sampler in (ours, theirs):
        with torch.inference_mode():
            drawn.append(guider().sample(noise, empty, sampler, levels(pack, made), disable_pbar=True, seed=3))
    assert "adds up its answers unseen" in caplog.text
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)


# Images as input


@pytest.mark.parametrize("name", ["flux", "wan21", "sd15"])
def test_an_inpainting_mask_leaves_the_rest_as_it_was(pack: Any, name: str) -> None:
    family = make(name)
    applied = apply(pack, family, train(pack, family, **SHORT)[0])
    image = torch.randn(family.latent["samples"].shape, generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(1, 1, *image.shape[-2:])
    mask[..., : image.shape[-1] // 2] = 1
    drawn = k_sample(family, applied, STEPS, CFG, STUDENT, latent=image, noise_mask=mask)
    right = image.shape[-1] // 2
    torch.testing.assert_close(drawn[..., right:], image[..., right:], rtol=1e-4, atol=1e-5)
    assert (drawn[..., :right] - image[..., :right]).abs().mean() > 0.1


def test_it_samples_other_sizes_than_it_was_fitted_at(pack: Any, flux: Family, applied: Any) -> None:
    for size in (8, 24, 40):
        drawn = k_sample(flux, applied, STEPS, CFG, STUDENT, latent=torch.zeros(1, 16, size, 16))
        assert drawn.shape == (1, 16, size, 16)
        assert drawn.isfinite().all()
