"""Guidance that changes from call to call, or that somebody else's code adds up: never a silently bad picture."""

from typing import Any

import pytest
import torch
from families import Family, make
from stock import known, stock
from toys import apply, guided, predictor, train

CFG, STEPS = 3.0, 5
CHANGES = [(1.0, 0.0, 0.6), (1.0, 0.6, 1.0), (1.5, 0.0, 0.6), (5.0, 0.0, 0.6), (7.0, 0.0, 1.0), (1.0, 0.0, 1.0)]


def sigmas(model: Any, scheduler: str = "amed", steps: int = STEPS) -> torch.Tensor:
    """What KSampler samples along."""
    import comfy.samplers  # noqa: PLC0415

    options = (model, steps, torch.device("cpu"), "euler", scheduler, 1.0, model.model_options)
    found: torch.Tensor = comfy.samplers.KSampler(*options).sigmas
    return found


def drawn(
    family: Family, model: Any, name: str, levels: torch.Tensor, cfg: float = CFG, **options: Any
) -> torch.Tensor:
    import comfy.samplers  # noqa: PLC0415

    sampler = comfy.samplers.ksampler(name, options)

    noise = torch.randn(family.latent["samples"].shape, generator=torch.Generator().manual_seed(11))
    with torch.inference_mode():
        made: torch.Tensor = guided(family, model, cfg).sample(
            noise, torch.zeros_like(noise), sampler, levels, disable_pbar=True, seed=0
        )
    return made


@pytest.fixture(scope="module")
def digits(pack: Any) -> Family:
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", 20).args
    return Family(model, positive, negative, latent)


@pytest.fixture(scope="module")
def digits_multistep(pack: Any, digits: Family) -> Any:
    settings = {"trajectories": 20, "held_out": 10, "batch_size": 10}
    return train(pack, digits, **settings, teacher_calls=0)[0]


def with_cfg(model: Any, cfg: float, begin: float, end: float) -> Any:
    """A MODEL whose guidance is another one in a part of the run, as CFG Override of newer ComfyUI makes it."""
    import comfy.patcher_extension  # noqa: PLC0415

    sampling = model.get_model_object("model_sampling")
    high, low = sampling.percent_to_sigma(begin), sampling.percent_to_sigma(end)

    def override(executor: Any, x: Any, timestep: Any, *more: Any, **named: Any) -> Any:
        guider = executor.class_obj
        before = guider.cfg
        if low <= float(timestep.flatten()[0]) <= high:
            guider.cfg = cfg
        try:
            return executor(x, timestep, *more, **named)
        finally:
            guider.cfg = before

    clone = model.clone()
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, override)
    return clone


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_where_guidance_is_another_for_some_calls_it_is_still_better_than_stock(
    pack: Any, digits: Family, digits_multistep: Any, change: tuple[float, float, float]
) -> None:
    model = (
        stock("CFGOverride", model=digits.model, cfg=change[0], start_percent=change[1], end_percent=change[2]).args[0]
        if "CFGOverride" in known()
        else with_cfg(digits.model, *change)
    )
    truth = drawn(digits, model, "heun", sigmas(digits.model, "karras", 60))
    applied = apply(pack, digits, digits_multistep, model)
    levels = sigmas(applied)

    def error(sampler: str, model: Any) -> float:
        return float((drawn(digits, model, sampler, levels) - truth).square().mean().sqrt())

    assert error("amed_multistep", applied) < min(error(name, model) for name in ("euler", "dpmpp_2m", "ipndm"))


def test_a_change_of_guidance_is_warned_of(
    pack: Any, digits: Family, digits_multistep: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changed = with_cfg(digits.model, 5.0, 0.0, 0.6)
    applied = apply(pack, digits, digits_multistep, changed)
    drawn(digits, applied, "amed_multistep", sigmas(applied))
    assert "patches was 'none' when the predictor was made" in caplog.text
    assert "override" in caplog.text


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_a_second_model_for_the_negative_answer_shows_guidance_as_one_does(pack: Any, cfg: float) -> None:
    """With the same model for both, the picture is the same as without the second; at cfg 1 it is never asked."""
    import comfy.samplers  # noqa: PLC0415

    if "DualModelGuider" not in known():
        pytest.skip("this ComfyUI has no DualModelGuider")
    flux = make("flux")
    settings = {"trajectories": 4, "held_out": 2, "batch_size": 2}
    made = train(pack, flux, **settings)[0]
    applied = apply(pack, flux, made)
    asked = {"model": applied, "model_negative": flux.model, "positive": flux.positive, "negative": flux.negative}
    (guider,) = stock("DualModelGuider", **asked, cfg=cfg).args
    noise = torch.randn(flux.latent["samples"].shape, generator=torch.Generator().manual_seed(11))
    sampler = comfy.samplers.sampler_object("amed_multistep")
    with torch.inference_mode():
        two = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas(applied), disable_pbar=True, seed=0)
    torch.testing.assert_close(two, drawn(flux, applied, "amed_multistep", sigmas(applied), cfg), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("student", ["amed", "amed_ipndm", "amed_multistep"])
def test_where_another_packs_code_answers_all_calls_are_plain(
    pack: Any, student: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LanPaint puts a loop into ComfyUI's guider that moves the sample inside a call."""
    import comfy.samplers  # noqa: PLC0415

    flux = make("flux")
    if student == "amed_multistep":
        made = train(pack, flux, trajectories=4, held_out=2, batch_size=2)[0]
    else:
        made = predictor(pack, flux, student, guidance=CFG)
    applied = apply(pack, flux, made)
    own, asked = comfy.samplers.CFGGuider.predict_noise, []

    def predict_noise(self: Any, x: Any, timestep: Any, *more: Any, **named: Any) -> Any:
        asked.append(float(timestep[0]))
        for _ in range(2):
            x = x + 0.1 * (own(self, x, timestep, *more, **named) - x)
        return own(self, x, timestep, *more, **named)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", predict_noise)
    levels = sigmas(applied)
    config = made.config
    base, options = ("euler", {}) if student == "amed" else ("ipndm", {"max_order": config.max_order})
    ours = drawn(flux, applied, student, levels)
    assert asked == pytest.approx(levels[:-1].tolist())
    assert "another pack's code answers here" in caplog.text
    torch.testing.assert_close(ours, drawn(flux, flux.model, base, levels, **options), rtol=1e-3, atol=1e-4)


def test_the_strengths_of_both_guidances_of_a_video_with_sound_are_shown(pack: Any) -> None:
    class Dual:
        video_cfg, audio_cfg, cfg = 3.0, 7.0, 7.0

    guider = Dual()
    vars(guider).update(video_cfg=3.0, audio_cfg=7.0, cfg=7.0)
    assert pack.nodes.pairing.guidance(guider) == "video_cfg 3, audio_cfg 7"
    assert pack.nodes.pairing.scale(guider) is None


def test_a_predictor_of_a_range_sees_guidance_in_units_of_the_scale_that_it_follows(pack: Any) -> None:
    pairing = pack.nodes.pairing
    config = predictor(pack, make("flux"), guidance=2.0).config
    assert pairing.scale_of_plan(config, 7.0) == 2.0
    ranged = type("Ranged", (), {"guidances": (2.0, 4.0), "guidance": 2.0})
    assert [pairing.scale_of_plan(ranged, s) for s in (1.0, 3.0, 9.0, None)] == [2.0, 3.0, 4.0, 2.0]
