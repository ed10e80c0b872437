"""Two models in one sampling: one for high and one for low noise, or one for each answer."""

from typing import Any

import pytest
import torch
from families import Family, make
from stock import known, stock
from toys import train

CFG, STEPS, SWITCH = 3.0, 5, 0.875
STOCK = ("euler", "dpmpp_2m", "ipndm", "uni_pc_bh2")
SETTINGS = {"trajectories": 8, "held_out": 4, "batch_size": 4, "teacher_calls": 0}


@pytest.fixture(scope="module")
def high(pack: Any) -> Family:
    del pack
    return make("wan21", batch=4)


@pytest.fixture(scope="module")
def low(pack: Any) -> Family:
    del pack
    return make("wan21", seed=1, batch=4)


def both(pack: Any, high: Family, low: Family, models: Any = None) -> Any:
    """Our guider."""
    one, other = models or (high.model, low.model)
    prompts = (high.positive, high.negative)
    return pack.nodes.AMEDTwoModelsGuider.execute(one, other, *prompts, CFG, SWITCH).args[0]


@pytest.fixture(scope="module")
def made(pack: Any, high: Family, low: Family) -> Any:
    return train(pack, high, guider=both(pack, high, low), **SETTINGS)[0]


def noise(family: Family) -> torch.Tensor:
    return torch.randn(family.latent["samples"].shape, generator=torch.Generator().manual_seed(11))


def one_run(guider: Any, family: Family, sampler: str, levels: torch.Tensor) -> torch.Tensor:
    import comfy.samplers  # noqa: PLC0415

    begin = noise(family)
    with torch.inference_mode():
        drawn: torch.Tensor = guider.sample(
            begin, torch.zeros_like(begin), comfy.samplers.sampler_object(sampler), levels, disable_pbar=True, seed=0
        )
    return drawn


def two_runs(
    models: Any, family: Family, sampler: str, levels: torch.Tensor, at: int, cfg: float = CFG
) -> torch.Tensor:
    """What two KSamplerAdvanced in a row do: the first returns its leftover noise, the second adds none."""
    import comfy.samplers  # noqa: PLC0415

    latent = torch.zeros_like(noise(family))
    for model, part, begin in zip(models, (levels[: at + 1], levels[at:]), (noise(family), None), strict=True):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(family.positive, family.negative)
        guider.set_cfg(cfg)
        drawn = torch.zeros_like(latent) if begin is None else begin
        with torch.inference_mode():
            latent = guider.sample(
                drawn, latent, comfy.samplers.sampler_object(sampler), part, disable_pbar=True, seed=0
            )
    return latent


def applied(pack: Any, models: Any, made: Any) -> list[Any]:
    return [pack.nodes.AMEDApplyPredictor.execute(model, made).args[0] for model in models]


def test_a_predictor_for_both_is_as_good_as_the_best_stock_sampler_in_one_run_and_in_two(
    pack: Any, high: Family, low: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    at, models = made.config.switch, (high.model, low.model)
    assert 0 < at < STEPS
    with_it = applied(pack, models, made)
    (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    assert levels[at - 1] >= SWITCH > levels[at]
    fine = torch.cat([torch.linspace(1, SWITCH, 40)[:-1], torch.linspace(SWITCH - 1e-4, 0.0, 100)])
    truth = one_run(both(pack, high, low), high, "heun", fine)

    def error(drawn: torch.Tensor) -> float:
        return float((drawn - truth).square().mean().sqrt())

    ours = one_run(both(pack, high, low, with_it), high, "amed_multistep", levels)
    halves = two_runs(with_it, high, "amed_multistep", levels, at)
    torch.testing.assert_close(halves, ours, rtol=1e-3, atol=1e-4)
    assert "AMED" not in caplog.text, "neither half is warned of"
    for name in STOCK:
        assert error(ours) <= error(one_run(both(pack, high, low), high, name, levels))
        assert error(halves) <= error(two_runs(models, high, name, levels, at))
    print({name: error(two_runs(models, high, name, levels, at)) for name in STOCK} | {"ours": error(ours)})


def test_k_sampler_advanced_twice_is_the_whole(pack: Any, high: Family, low: Family, made: Any) -> None:
    """By the stock nodes themselves, with the scheduler `amed`."""
    at, (first, second) = made.config.switch, applied(pack, (high.model, low.model), made)
    shared = {"noise_seed": 3, "steps": STEPS, "cfg": CFG, "sampler_name": "amed_multistep", "scheduler": "amed"}
    shared |= {"positive": high.positive, "negative": high.negative}
    with torch.inference_mode():
        half = stock(
            "KSamplerAdvanced", model=first, latent_image=high.latent, add_noise="enable", start_at_step=0,
            end_at_step=at, return_with_leftover_noise="enable", **shared,
        )[0]  # fmt: skip
        rest = stock(
            "KSamplerAdvanced", model=second, latent_image=half, add_noise="disable", start_at_step=at,
            end_at_step=10000, return_with_leftover_noise="disable", **shared,
        )[0]["samples"]  # fmt: skip
        whole = stock(
            "SamplerCustomAdvanced",
            noise=stock("RandomNoise", noise_seed=3)[0],
            guider=both(pack, high, low, (first, second)),
            sampler=pack.nodes.AMEDSampler.execute(made).args[0],
            sigmas=pack.nodes.AMEDScheduler.execute(made, 1.0).args[0],
            latent_image=high.latent,
        )[0]["samples"]
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-4)


def test_each_model_is_asked_at_its_own_levels(pack: Any, high: Family, low: Family, made: Any) -> None:
    asked: dict[str, list[float]] = {"high": [], "low": []}

    def watched(name: str, model: Any) -> Any:
        clone = model.clone()

        def look(apply_model: Any, parameters: Any) -> torch.Tensor:
            asked[name].append(float(parameters["timestep"][0]))
            answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
            return answer

        clone.set_model_unet_function_wrapper(look)
        return clone

    models = applied(pack, [watched("high", high.model), watched("low", low.model)], made)
    (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    one_run(both(pack, high, low, models), high, "amed_multistep", levels)
    at = made.config.switch
    assert (len(set(asked["high"])), len(set(asked["low"]))) == (at, STEPS - at)
    assert min(asked["high"]) >= SWITCH > max(asked["low"])


def test_what_is_wrapped_around_a_model_stays_around_it(pack: Any, high: Family, low: Family) -> None:
    """Packs that cache or watch a model wrap it; ComfyUI itself hands on the wrappers of a guider's first model."""
    import comfy.patcher_extension  # noqa: PLC0415

    heard: list[str] = []

    def wrapped(name: str, model: Any) -> Any:
        clone = model.clone()

        def hear(executor: Any, *args: Any, **more: Any) -> Any:
            heard.append(name)
            return executor(*args, **more)

        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", hear)
        return clone

    guider = both(pack, high, low, [wrapped("high", high.model), wrapped("low", low.model)])
    one_run(guider, high, "euler", torch.tensor([1.0, 0.9, 0.5, 0.2, 0.0]))
    assert heard == ["high", "high", "low", "low"]


def test_what_the_node_says_names_the_step(pack: Any, made: Any) -> None:
    assert f"second model from step {made.config.switch}" in pack.nodes.values.describe(made)


def test_another_second_model_is_warned_of(
    pack: Any, high: Family, low: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changed = low.model.clone()
    changed.add_object_patch(
        "model_sampling", stock("ModelSamplingSD3", model=low.model, shift=9.0)[0].get_model_object("model_sampling")
    )
    (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    two_runs(applied(pack, (high.model, changed), made), high, "amed_multistep", levels, made.config.switch)
    assert caplog.text.count("shift was") == 1


def test_a_predictor_through_the_guider_of_a_second_model_for_the_negative_answer(
    pack: Any, high: Family, low: Family
) -> None:
    if "DualModelGuider" not in known():
        pytest.skip("this ComfyUI has no DualModelGuider")

    def guider(model: Any) -> Any:
        asked = {"model": model, "model_negative": low.model, "positive": high.positive, "negative": high.negative}
        return stock("DualModelGuider", **asked, cfg=CFG)[0]

    made = train(pack, high, guider=guider(high.model), **SETTINGS)[0]
    assert made.config.guided
    assert made.config.model["guider"] == "Guider_DualModel"
    (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    truth = one_run(guider(high.model), high, "heun", torch.linspace(1, 0, 100))
    (with_it,) = applied(pack, (high.model,), made)
    errors = {
        name: float((one_run(guider(model), high, name, levels) - truth).square().mean().sqrt())
        for name, model in [("amed_multistep", with_it), *((name, high.model) for name in STOCK)]
    }
    assert errors.pop("amed_multistep") <= min(errors.values())


@pytest.mark.parametrize("how", [{"prompts": "a cat", "clip": object()}, {"cfg_max": 5.0}])
def test_a_guider_leaves_no_room_for_other_prompts_or_scales(
    pack: Any, high: Family, low: Family, how: dict[str, Any]
) -> None:
    (name, *_) = how
    with pytest.raises(ValueError, match=f"^{name} .* has no effect: A guider brings its own prompts and cfg"):
        train(pack, high, guider=both(pack, high, low), **SETTINGS, **how)


def test_a_set_serves_all_its_numbers_of_steps(pack: Any, high: Family, low: Family) -> None:
    """In one run and in two, as each of its predictors alone."""
    few = {"trajectories": 2, "held_out": 2, "teacher_calls": 12, "effort": "quick"}
    made = train(pack, high, guider=both(pack, high, low), cfg=CFG, steps="3-4", **few)[0]
    with_it = applied(pack, (high.model, low.model), made)
    for steps, one in zip((3, 4), made.every.from_noise, strict=True):
        alone = applied(pack, (high.model, low.model), pack.nodes.values.NotedPredictor(one))
        (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0, steps).args
        assert len(levels) == steps + 1
        ours, theirs = (two_runs(m, high, "amed_multistep", levels, one.config.switch) for m in (with_it, alone))
        assert torch.equal(ours, theirs)
