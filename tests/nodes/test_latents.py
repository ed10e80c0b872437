"""Latents of today's models: of their own size, of several streams packed into one sample, and shown as they go."""

import math
from typing import Any

import pytest
import torch
from families import SPECS, Family, here, make, prompt
from stock import stock
from toys import apply, k_sample, train

MULTISTEP = {"steps": 3, "trajectories": 4, "held_out": 2, "batch_size": 2}
STUDENTS = {"network": {"paper": True}, "table": {"paper": True, "predictor_type": "table"}, "multistep": MULTISTEP}


def exists(name: str) -> None:
    if name not in here():
        pytest.skip(f"this ComfyUI has no {SPECS[name].kind}")


# Previews


@pytest.mark.parametrize(("method", "student"), [*(("none", student) for student in STUDENTS), ("latent2rgb", "table")])
def test_latents_that_are_rearranged_for_their_preview_train(
    pack: Any, method: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX.2's 128 channels are 32 in patches of 2 by 2."""
    import comfy.cli_args  # noqa: PLC0415
    import comfy.utils  # noqa: PLC0415
    import latent_preview  # noqa: PLC0415

    exists("flux2")
    methods = latent_preview.LatentPreviewMethod
    chosen = methods.NoPreviews if method == "none" else methods.Latent2RGB
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", chosen)
    shown: list[Any] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, node_id=None: shown.append(picture)
    )
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_ENABLED", True)
    family = make("flux2")
    made = train(pack, family, **STUDENTS[student])[0]
    assert any(picture is not None for picture in shown)
    name, calls = pack.amed_core.samplers.sampler_name(made.config), made.config.calls
    assert k_sample(family, apply(pack, family, made), calls, 3.0, name).isfinite().all()


def test_a_preview_that_fails_ends_no_fit(
    pack: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import latent_preview  # noqa: PLC0415

    class Broken:
        asked = 0

        def decode_latent_to_preview(self, latent: torch.Tensor) -> Any:
            Broken.asked += 1
            raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied {tuple(latent.shape)}")

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Broken())
    assert train(pack, make("flux"), paper=True)[2]
    assert Broken.asked == 1, "it is not tried again"
    told = "there is no preview of this model's latents, which does not harm what is trained"
    assert caplog.text.count(told) == 1


def test_cancel_during_a_preview_is_cancel(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer ComfyUI raises it in the middle of any operation."""
    import comfy.model_management as mm  # noqa: PLC0415
    import latent_preview  # noqa: PLC0415

    class Pressed:
        def decode_latent_to_preview(self, latent: torch.Tensor) -> Any:
            raise mm.InterruptProcessingException()

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Pressed())
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, make("flux"), paper=True)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [0.0, 0.0]], ids=["none", "nan", "0"])
def test_a_plot_of_odd_errors_is_a_plot(pack: Any, values: list[float]) -> None:
    from amed_core.fit.report import IntervalReport  # noqa: PLC0415

    report = IntervalReport("amed", "euler", (1.0, 0.5, 0.0), values, values, [])
    assert pack.nodes.previews.plot(report, "odd").isfinite().all()


# Sizes


def asked_shapes(family: Family, work: Any) -> set[tuple[int, ...]]:
    """The shapes of latents, without the batch, that the network is asked about while something is done."""
    network, found = family.model.model.diffusion_model, set()
    forward = network.forward

    def looking(x: Any, *more: Any, **named: Any) -> Any:
        found.add(tuple((x[0] if isinstance(x, list) else x).shape[1:]))
        return forward(x, *more, **named)

    network.forward = looking
    try:
        work()
    finally:
        network.forward = forward
    return found


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma_radiance", "wan22_5b", "ltxv"])
@pytest.mark.parametrize("kind", ["EmptyLatentImage", "EmptySD3LatentImage"])
def test_an_empty_latent_is_trained_on_at_the_size_that_k_sampler_samples(pack: Any, name: str, kind: str) -> None:
    """Empty latents may say for which ratio they were made; KSampler resizes them to the model's own."""
    exists(name)
    family = make(name)
    latent = stock(kind, width=256, height=128, batch_size=2)[0]
    sampling = {"model": family.model, "positive": family.positive, "negative": family.negative, "latent_image": latent}

    def k_sampler() -> None:
        with torch.inference_mode():
            stock("KSampler", **sampling, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", seed=0)

    of_sampling = asked_shapes(family, k_sampler)
    given = Family(family.model, family.positive, family.negative, latent)
    assert asked_shapes(family, lambda: train(pack, given, paper=True, cfg=1.0, features="none")) == of_sampling
    assert len(of_sampling) == 1


# Streams


@pytest.fixture(scope="module")
def video_with_sound(pack: Any) -> Family:
    del pack
    exists("ltxav")
    return make("ltxav")


@pytest.mark.parametrize("how", STUDENTS.values(), ids=STUDENTS)
def test_several_prompts_on_packed_latents(pack: Any, video_with_sound: Family, how: dict[str, Any]) -> None:
    family = video_with_sound
    positives = [family.positive, prompt("ltxav", 7), prompt("ltxav", 8), prompt("ltxav", 9)]
    made, _, report, _ = train(pack, family, positives=positives, **how)
    assert made.notes["training"]["prompts"] == 4
    assert report.count("of the finished sample, each by itself") == 2, "an error for the video and one for its sound"


def test_the_report_names_the_streams_and_their_preview_is_the_first(pack: Any, video_with_sound: Family) -> None:
    family = video_with_sound
    shapes = [" x ".join(map(str, part.shape[1:])) for part in family.latent["samples"].unbind()]
    report = train(pack, family, **MULTISTEP)[2]
    assert all(f"part {n}: {shape} " in report for n, shape in enumerate(shapes, start=1))


def test_balanced_streams_count_alike_and_samplers_do_not_notice(pack: Any) -> None:
    """The mean square over all elements is the mean of the streams' own, and a scaled run is the run, scaled."""
    from amed_core import Method, sample  # noqa: PLC0415
    from amed_core.driver import NoMidpoint  # noqa: PLC0415
    from amed_core.solvers import DpmSolverPP  # noqa: PLC0415

    streams = pack.nodes.streams
    shapes = ((2, 16, 3, 8, 8), (2, 8, 10))
    packed = torch.randn(2, 1, 16 * 3 * 8 * 8 + 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    balance = streams.Balance.of(shapes, packed)
    own = [part.square().mean() for part in streams.streams(packed, shapes)]
    torch.testing.assert_close(balance.scaled(packed).square().mean(), sum(own) / 2)
    torch.testing.assert_close(balance.unscaled(balance.scaled(packed)), packed)
    assert [tuple(part.shape) for part in balance.parts(packed).values()] == list(shapes)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> Any:
        return torch.tanh(x) / (1 + sigma), None, None

    method = Method((10.0, 2.0, 0.5, 0.0), DpmSolverPP(2), NoMidpoint())
    plain = sample(model, packed, method)
    scaled = sample(balance.denoiser(model), balance.scaled(packed), method)
    torch.testing.assert_close(balance.unscaled(scaled), plain)


def test_samples_of_one_stream_are_left_as_they_are(pack: Any) -> None:
    x = torch.ones(2, 4, 8, 8)
    balance = pack.nodes.streams.Balance.of((), x)
    assert balance.scaled(x) is x
    assert balance.unscaled(x) is x
    assert balance.parts(x) == {}
    assert balance.denoiser(k_sample) is k_sample


# What newer ComfyUI has


def test_fused_kernels_are_kept_where_no_autograd_runs(pack: Any) -> None:
    """Newer ComfyUI takes slower kernels, and slightly other numbers, as soon as it is told that it trains."""
    import comfy.model_management as mm  # noqa: PLC0415

    if not hasattr(mm, "in_training"):
        pytest.skip("this ComfyUI is not told whether it trains")
    family, seen = make("flux"), {}
    network = family.model.model.diffusion_model
    forward = network.forward
    for gradient in ("finite difference", "reverse"):
        told: set[bool] = set()

        def looking(*args: Any, told: set[bool] = told, **named: Any) -> Any:
            told.add(mm.in_training)
            return forward(*args, **named)

        network.forward = looking
        train(pack, family, paper=True, gradient=gradient, features="none", cfg=1.0)
        seen[gradient] = told
    assert seen == {"finite difference": {False}, "reverse": {True}}
    assert not mm.in_training


@pytest.mark.parametrize("scheduler", ["auto", "searched"])
def test_a_model_without_batches_trains_with_the_default_batch(pack: Any, scheduler: str) -> None:
    exists("minimax_h3")
    family = make("minimax_h3")
    how = {"paper": True, "predictor_type": "table", "trajectories": 2, "batch_size": 16, "scheduler": scheduler}
    assert train(pack, family, **how, sampler_name="amed_ipndm")[0].notes["training"]["batch_size"] == 2
