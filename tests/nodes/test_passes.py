"""Calls that ask no negative: as many passes as were promised, and the same picture where it is asked anyway."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import Family, make
from stock import stock
from toys import apply, dual_cfg, guided, inside, k_sample, train

from amed_core import evaluate

STUDENT, CFG, CALLS = "amed_multistep", 3.0, 4


@pytest.fixture(scope="module")
def made(pack: Any, flux: Family) -> Any:
    return saving(pack, flux)


def saving(pack: Any, family: Family, **changes: Any) -> Any:
    """A predictor of 4 calls that asks the negative at 2 of them; it has learned nothing."""
    core = pack.amed_core
    facts = pack.nodes.pairing.model_facts(family.model, guided=True)
    config = core.student_config(STUDENT, CALLS, facts, guidance=CFG, negatives=(0, 2), **changes)
    return pack.nodes.values.NotedPredictor(core.MultistepTable(config))


@contextmanager
def passes(family: Family, model: Any = None) -> Iterator[list[int]]:
    """How many samples the network itself is handed, pass by pass."""
    seen: list[int] = []
    network = (model or family.model).model.diffusion_model
    hook = network.register_forward_pre_hook(lambda network, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()


def drawn(pack: Any, family: Family, made: Any, model: Any = None, **more: Any) -> tuple[torch.Tensor, int]:
    """A picture, and the passes that it took."""
    with passes(family) as seen:
        picture = k_sample(family, apply(pack, family, made, model), CALLS, CFG, STUDENT, **more)
    return picture, sum(seen)


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan21"])
def test_the_network_is_passed_once_for_every_call_and_negative(pack: Any, name: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    family = make(name)
    count = len(family.latent["samples"])
    _, taken = drawn(pack, family, saving(pack, family))
    assert taken == count * (CALLS + 2)
    assert f"{CALLS} model calls, {CALLS + 2} passes of the network" in caplog.text
    with passes(family) as seen:
        k_sample(family, family.model, CALLS, CFG, "euler", "normal")
    assert sum(seen) == count * 2 * CALLS


def always_asked(family: Family) -> Any:
    """A clone of the MODEL that asks its negative even at cfg 1, as some nodes have it."""
    clone = family.model.clone()
    clone.model_options["disable_cfg1_optimization"] = True
    return clone


def test_where_the_negative_is_asked_anyway_the_picture_is_the_same_and_it_says_so(
    pack: Any, flux: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    picture, _ = drawn(pack, flux, made)
    assert "asked at every call" not in caplog.text
    other, taken = drawn(pack, flux, made, always_asked(flux))
    torch.testing.assert_close(other, picture, rtol=1e-3, atol=1e-4)
    assert taken == len(flux.latent["samples"]) * 2 * CALLS
    assert "asked at every call" in caplog.text


def test_an_inpainting_mask_is_respected_by_calls_of_both_kinds(pack: Any, flux: Family, made: Any) -> None:
    image = torch.randn(flux.latent["samples"].shape, generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(1, 1, *image.shape[-2:])
    mask[..., : image.shape[-1] // 2] = 1
    masked = {"latent": image, "noise_mask": mask}
    one, other = (drawn(pack, flux, made, model, **masked)[0] for model in (None, always_asked(flux)))
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("anyway", [False, True])
def test_the_conditional_answer_is_that_of_cfg_1(pack: Any, flux: Family, anyway: bool) -> None:
    model = always_asked(flux) if anyway else flux.model

    def answers(inner: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> Any:
        denoiser = pack.nodes.bridge.ComfyDenoiser(inner, extra_args, [0.7, 0.0], bottleneck=False, guidance=CFG)
        found = evaluate(denoiser, x * sigmas[0], sigmas[0], negative=False)
        guided_again = evaluate(denoiser, x * sigmas[0], sigmas[0])
        assert found.guidance is None
        return found.denoised, guided_again.denoised, denoiser.passes

    conditional, whole, taken = inside(guided(flux, model, CFG), flux, answers)
    plain, _, _ = inside(guided(flux, cfg=1.0), flux, answers)
    torch.testing.assert_close(conditional, plain, rtol=1e-3, atol=1e-4)
    assert (whole - conditional).abs().max() > 1e-3, "afterwards it is guided as before"
    assert taken == len(plain) * (4 if anyway else 3)


def test_a_node_that_changes_guidance_keeps_its_negative(pack: Any, flux: Family, made: Any) -> None:
    rescaled = stock("RescaleCFG", model=flux.model, multiplier=0.7)[0]
    picture, taken = drawn(pack, flux, made, rescaled)
    assert picture.isfinite().all()
    assert taken == len(flux.latent["samples"]) * 2 * CALLS


def test_where_guidance_is_not_to_be_seen_all_calls_are_plain_guided_ones(
    pack: Any, flux: Family, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    (levels,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    noise = torch.randn(flux.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), passes(flux) as seen:
        guider = dual_cfg(flux, flux.negative)
        picture = guider.sample(noise, torch.zeros_like(noise), sampler, levels, disable_pbar=True, seed=3)
    assert picture.isfinite().all()
    assert sum(seen) == len(noise) * 3 * CALLS
    assert "adds up its answers unseen" in caplog.text


def test_at_another_cfg_what_is_carried_changes_in_proportion(pack: Any, flux: Family, made: Any) -> None:
    """At the cfg it was made for, at none, and between: a picture between those of both, and no error."""
    applied = apply(pack, flux, made)
    strong, weak, none = (k_sample(flux, applied, CALLS, cfg, STUDENT) for cfg in (CFG, 2.0, 1.0))
    assert (weak - none).norm() < (strong - none).norm()


def test_training_for_passes_makes_a_predictor_of_no_more(pack: Any, flux: Family) -> None:
    made, _, report, _ = train(pack, flux, passes=4, teacher_calls=8, trajectories=1, held_out=1, effort="quick")
    config = made.config
    assert config.passes <= 4
    assert f"{config.calls} model calls, which are {config.passes} passes of the network" in report
    assert "ask the negative" in report
    assert made.notes["training"]["passes"] == config.passes
    _, taken = drawn_in(pack, flux, made, config.calls)
    assert taken == len(flux.latent["samples"]) * config.passes


def drawn_in(pack: Any, family: Family, made: Any, calls: int) -> tuple[torch.Tensor, int]:
    with passes(family) as seen:
        picture = k_sample(family, apply(pack, family, made), calls, CFG, STUDENT)
    return picture, sum(seen)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"passes": 3}, "too few"),
        ({"cfg": 1.0}, "never asked"),
        ({"cfg_max": 6.0}, "one number of steps"),
        ({"steps": "3-8"}, "one number of steps"),
        ({"starts": "noise and images"}, "starts is"),
    ],
)
def test_passes_that_would_change_nothing_are_refused(pack: Any, flux: Family, changes: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        train(pack, flux, **({"passes": 10} | changes))


def test_passes_are_refused_where_no_negative_can_be_left_out(pack: Any, flux: Family) -> None:
    with pytest.raises(ValueError, match="asks the negative at every call"):
        train(pack, flux, always_asked(flux), passes=10)
