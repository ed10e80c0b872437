"""The nodes and the bridge, in this process, against the core on the same model."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import train

from amed_core import AMEDPredictor, load_predictor, sample
from amed_core.digits import FINGERPRINT, SHAPE, SIGMA_MAX, SIGMA_MIN, DigitsDenoiser
from amed_core.features import pool
from amed_core.samplers import ModelFacts, student_config

FACTS = ModelFacts(SIGMA_MIN, SIGMA_MAX, bottleneck=True, fingerprint=FINGERPRINT)
SHIPPED = Path(__file__).parents[2] / "predictors"


@pytest.fixture
def demo(pack: Any) -> Any:
    """The outputs of AMED Demo Model."""
    model, positive, negative, latent, vae = pack.nodes.AMEDDemoModel.execute("0 to 9", 10).args
    return SimpleNamespace(model=model, positive=positive, negative=negative, latent=latent, vae=vae)


def predictor(pack: Any, name: str = "amed", calls: int = 5, **changes: Any) -> Any:
    config = student_config(name, calls, FACTS, **changes)
    return pack.nodes.values.NotedPredictor(AMEDPredictor(config, torch.Generator().manual_seed(1)))


def k_sample(demo: Any, model: Any, steps: int, cfg: float, sampler: str, scheduler: str, **more: Any) -> torch.Tensor:
    """What KSampler does with seed 3."""
    import comfy.sample  # noqa: PLC0415

    latent = demo.latent["samples"]
    noise = comfy.sample.prepare_noise(latent, 3)
    conditions = (demo.positive, demo.negative)
    with torch.inference_mode():
        drawn: torch.Tensor = comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, *conditions, latent, seed=3, disable_pbar=True, **more
        )
    return drawn


def start(count: int = 10) -> torch.Tensor:
    """ComfyUI's noise of seed 3 at sigma_max."""
    noise = torch.randn(count, *SHAPE, generator=torch.manual_seed(3))
    return noise * (1 + SIGMA_MAX**2) ** 0.5


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed", 4), ("amed_ipndm", 6), ("amed_dpmpp_3m", 7)])
def test_k_sampler_equals_the_core(pack: Any, demo: Any, name: str, calls: int, cfg: float) -> None:
    """Also the features: a predictor reads them, for the positive rows only."""
    made = predictor(pack, name, calls, guidance=cfg)
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, made).args
    theirs = k_sample(demo, applied, calls, cfg, name, "amed")
    ours = sample(
        DigitsDenoiser(cfg).for_rows(range(10)),
        start(),
        made.predictor.method(),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_features_are_those_of_the_positive_rows(pack: Any, demo: Any) -> None:
    import comfy.samplers  # noqa: PLC0415

    seen = {}

    class Look(comfy.samplers.Sampler):
        def sample(self, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *_: Any) -> Any:
            seen["answer"] = pack.nodes.bridge.ComfyDenoiser(guider, extra_args, sigmas.tolist(), bottleneck=True)(
                noise, sigmas[0]
            )
            return noise

    x = torch.randn(10, *SHAPE, generator=torch.manual_seed(0))
    for cfg, negative in ((1.0, demo.negative), (4.0, demo.negative), (4.0, demo.positive)):
        guider = comfy.samplers.CFGGuider(demo.model)
        guider.set_conds(demo.positive, negative)
        guider.set_cfg(cfg)
        guider.sample(x, torch.zeros_like(x), Look(), torch.tensor([0.7, 0.0]), disable_pbar=True, seed=0)
        expected = DigitsDenoiser().for_rows(range(10))(x, torch.tensor(0.7))[1]
        torch.testing.assert_close(seen["answer"][1].cpu(), pool(expected), rtol=1e-4, atol=1e-4)


def fingerprint_of(model: Any) -> Any:
    """Everything of a ModelPatcher that sampling or training could leave changed."""
    weights = {name: value.cpu().clone() for name, value in model.model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    grads = [p.requires_grad for p in model.model.parameters()]
    return weights, hooks, grads, str(model.model_options), dict(model.object_patches), dict(model.attachments)


def test_sampling_and_training_leave_the_model_untouched(pack: Any, demo: Any) -> None:
    before = fingerprint_of(demo.model)
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, predictor(pack)).args
    k_sample(demo, applied, 5, 2.0, "amed", "amed")
    fit(pack, demo, trajectories=16)
    after = fingerprint_of(demo.model)
    assert all((before[0][k] == after[0][k]).all() for k in before[0])
    assert before[1:] == after[1:]


def fit(pack: Any, demo: Any, **changes: Any) -> Any:
    usual: dict[str, Any] = {"cfg": 1.0, "trajectories": 320, "batch_size": 16, "held_out": 32, "teacher_calls": 40}
    return train(pack, demo, paper=True, **(usual | changes))


def test_training_is_repeatable_and_its_file_says_how_it_was_made(pack: Any, demo: Any) -> None:
    (one, loss), (same, _), (other, _) = (fit(pack, demo, trajectories=64, seed=s, cfg=2.0)[:2] for s in (5, 5, 6))
    weights = [list(p.predictor.parameters()) for p in (one, same, other)]
    assert all((a == b).all() for a, b in zip(weights[0], weights[1], strict=True))
    assert not all((a == b).all() for a, b in zip(weights[0], weights[2], strict=True))
    assert len(loss["loss"]) == 4
    assert one.config.guidance == 2.0
    assert one.config.model["family"] == "AMEDDigits"
    assert one.notes["training"]["seed"] == 5


def test_the_paper_preset_is_the_published_recipe(pack: Any, demo: Any) -> None:
    made, *_ = fit(pack, demo, trajectories=8, preset="paper")
    published = student_config("amed", 5, FACTS, published=True)
    torch.testing.assert_close(torch.tensor(made.config.sigmas), torch.tensor(published.sigmas))
    assert made.config.analytic_first_step


def test_a_table_is_nearer_to_the_teacher_than_its_base_solver(pack: Any, demo: Any) -> None:
    """On noise that it was not fitted on, from 32 trajectories; the loss output is its error per iteration."""
    made, loss, *_ = fit(pack, demo, predictor_type="table", sampler_name="amed_ipndm", trajectories=32)
    training = made.notes["training"]
    assert training["error"] < training["baseline_error"]
    assert loss["loss"][-1] < loss["loss"][0]
    assert training["model_calls"] < 12_000


def test_the_loss_falls(pack: Any, demo: Any) -> None:
    _, loss, *_ = fit(pack, demo, trajectories=640)
    assert sum(loss["loss"][-5:]) < 0.7 * sum(loss["loss"][:5])


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_progress_counts_model_calls_whatever_the_scheduler(pack: Any, demo: Any, steps: int) -> None:
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, predictor(pack)).args
    heard: list[tuple[int, int]] = []

    def hear(step: int, x0: Any, x: Any, total: int) -> None:
        heard.append((step, total))

    k_sample(demo, applied, steps, 1.0, "amed", "karras", callback=hear)
    assert heard == [(i, steps) for i in range(steps)]


def test_interrupting_stops_before_the_next_model_call(pack: Any, demo: Any) -> None:
    import comfy.model_management  # noqa: PLC0415

    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, predictor(pack)).args
    calls = []

    def press_stop(step: int, *_: Any) -> None:
        calls.append(step)
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        k_sample(demo, applied, 5, 1.0, "amed", "amed", callback=press_stop)
    assert calls == [0]


@pytest.mark.trust("registration")
def test_registration_adds_and_never_twice(pack: Any) -> None:
    import comfy.samplers  # noqa: PLC0415

    asyncio.run(pack.comfy_entrypoint())
    names = comfy.samplers.KSampler.SAMPLERS
    for name in pack.amed_core.samplers.NAMES:
        assert names.count(name) == 1
    assert comfy.samplers.KSampler.SCHEDULERS.count("amed") == 1
    assert names[0] == "euler"
    assert comfy.samplers.KSampler.SCHEDULERS[0] == "simple"


def test_every_input_and_output_has_a_tooltip(pack: Any) -> None:
    for node in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list()):
        schema = node.define_schema()
        assert schema.category == "AMED"
        assert schema.description
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip, f"{schema.node_id}: {socket.id or socket.display_name} has no tooltip"


@pytest.mark.parametrize("module", ["sampling", "sampler", "values"])
def test_sampling_nodes_import_nothing_that_trains(pack: Any, module: str) -> None:
    source = Path(getattr(pack.nodes, module).__file__).read_text()
    assert "from ." in source, "or this is not the file that is meant"
    assert "amed_core.fit" not in source
    assert "from ..amed_core import" not in source, "which imports all of it"


def test_the_demo_vae_shrinks_and_enlarges_by_eight(pack: Any, demo: Any) -> None:
    latent = torch.rand(2, 1, 16, 16) * 2 - 1
    smooth = torch.nn.functional.avg_pool2d(latent, 5, 1, 2)
    image = demo.vae.decode(smooth)
    assert image.shape == (2, 128, 128, 3)
    torch.testing.assert_close(demo.vae.encode(image), smooth, rtol=0, atol=0.1)


def test_a_predictor_of_another_model_is_refused(pack: Any, demo: Any) -> None:
    config = student_config("amed", 5, replace(FACTS, fingerprint={**FINGERPRINT, "family": "SD15"}))
    with pytest.raises(ValueError, match="family 'SD15', but the loaded model has 'AMEDDigits'"):
        pack.nodes.AMEDApplyPredictor.execute(demo.model, pack.nodes.values.NotedPredictor(AMEDPredictor(config)))


def test_nan_from_the_model_names_interval_and_call(pack: Any, demo: Any) -> None:
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, predictor(pack)).args
    applied.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] * (float("nan") if float(args["sigma"][0]) < 4 else 1)
    )
    with pytest.raises(FloatingPointError, match="interval 2, model call 2"):
        k_sample(demo, applied, 5, 1.0, "amed", "amed")


def test_an_empty_predictor_folder_says_what_to_do(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths  # noqa: PLC0415

    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: [])
    loader = pack.nodes.AMEDLoadPredictor
    options = loader.define_schema().inputs[0].options
    assert options == ["(no predictor found)"]
    assert "AMED Train Predictor" in loader.validate_inputs(options[0])


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("digits_*.safetensors")), ids=lambda file: file.stem)
def test_shipped_predictors_load_and_apply(pack: Any, demo: Any, file: Path) -> None:
    made = pack.nodes.values.NotedPredictor(load_predictor(file))
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, made).args
    name = pack.amed_core.samplers.sampler_name(made.config)
    assert k_sample(demo, applied, made.config.calls, 1.0, name, "amed").isfinite().all()
