"""KSampler alone: the first picture teaches, the second takes as many calls as steps says."""

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, control_net, make, prompt
from stock import stock
from test_modes import lora
from toys import dual_cfg, flat, guided, heard, image, inside, k_sample, stopped_at
from trials import Trials

CFG, STEPS, TEACHER = 3.0, 4, 24


@pytest.fixture(scope="module")
def demo(pack: Any) -> Family:
    """The digits model, asked for two digits."""
    return digits(pack, 2)


def digits(pack: Any, batch: int) -> Family:
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", batch).args
    return Family(model, positive, negative, latent)


@pytest.fixture
def kept(user: Path) -> Path:
    """Where learned sets are."""
    return user.parent / "amed_learned"


def files(kept: Path) -> list[Path]:
    return sorted(kept.glob("*.safetensors"))


def counted(family: Family, model: Any = None) -> tuple[Any, list[Any]]:
    """The MODEL, and a list of all it is asked."""
    asked: list[Any] = []
    return heard(model or family.model, asked.append), asked


def learning(pack: Any, model: Any, mode: str = "automatically", **changes: Any) -> Any:
    """The MODEL after "AMED Learn"."""
    settings: dict[str, Any] = {"pictures": 4, "teacher_calls": TEACHER, "forget": False} | changes
    (made,) = pack.nodes.AMEDLearn.execute(model, mode, **settings).args
    return made


def sampled(family: Family, model: Any, seed: int, steps: int, sampler: str, scheduler: str) -> torch.Tensor:
    """What KSampler makes of a seed without guidance."""
    import comfy.sample  # noqa: PLC0415

    latent = family.latent["samples"]
    prompts = (family.positive, family.negative)
    with torch.inference_mode():
        return flat(
            comfy.sample.sample(
                model,
                comfy.sample.prepare_noise(latent, seed),
                steps,
                1.0,
                sampler,
                scheduler,
                *prompts,
                latent,
                seed=seed,
                disable_pbar=True,
            )
        )


def sentences(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of runs, but what each of them cost."""
    return [message for message in caplog.messages if "passes of the network" not in message]


@pytest.mark.parametrize("name", ["amed", "amed_multistep"])
@pytest.mark.parametrize("scheduler", ["amed", "karras"])
def test_the_second_run_takes_as_many_calls_as_steps_says(
    pack: Any, demo: Family, kept: Path, name: str, scheduler: str
) -> None:
    del pack
    model, asked = counted(demo)
    for run in range(4):
        asked.clear()
        assert k_sample(demo, model, STEPS, 1.0, name, scheduler).isfinite().all()
        assert len(asked) == STEPS if run % 2 else len(asked) > TEACHER, "every other run teaches, at first"
    assert len(files(kept)) == 1


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "ltxav"])
def test_it_learns_toy_families(pack: Any, name: str) -> None:
    del pack
    family = make(name)
    model, asked = counted(family)
    k_sample(family, model, 1, CFG)
    at_once = len(asked)
    assert k_sample(family, model, STEPS, CFG).isfinite().all()
    asked.clear()
    assert k_sample(family, model, STEPS, CFG).isfinite().all()
    assert len(asked) == STEPS * at_once


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_first_picture_is_the_teachers(pack: Any, name: str) -> None:
    family = make(name)
    drawn = k_sample(family, family.model, STEPS, CFG)
    learner = pack.nodes.learning

    def taught(model: Any, noise: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> torch.Tensor:
        guider = pack.nodes.bridge.guider_of(model)
        start = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
        levels = sigmas.tolist()
        one = learner._learner(learner._config(guider, levels), levels, True, guider, learner.Learning())
        denoiser = pack.nodes.bridge.ComfyDenoiser(model, extra_args, one.teacher_levels, bottleneck=False)
        end: torch.Tensor = one.taught(denoiser, start).end
        return end

    placed = pack.nodes.own_grid.placeholder(family.model.get_model_object("model_sampling"), STEPS)
    expected = inside(guided(family), family, taught, tuple(placed.tolist()))
    expected = family.model.model.process_latent_out(expected)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_what_it_learned_is_nearer_to_the_slow_picture_than_plain_solvers(pack: Any) -> None:
    family = digits(pack, 10)
    sampled(family, family.model, 1, 5, "amed", "amed")
    ours, stocks = [], {(s, g): [] for s in ("ipndm", "dpmpp_2m") for g in ("karras", "simple", "sgm_uniform")}
    for seed in range(2, 6):
        slow = sampled(family, family.model, seed, 60, "ipndm", "karras")
        ours.append((sampled(family, family.model, seed, 5, "amed", "amed") - slow).square().mean())
        for (sampler, scheduler), errors in stocks.items():
            errors.append((sampled(family, family.model, seed, 5, sampler, scheduler) - slow).square().mean())
    assert sum(ours) < min(sum(errors) for errors in stocks.values())


# Situations


def test_every_use_is_a_situation_of_its_own(pack: Any, demo: Family, kept: Path) -> None:
    del pack
    model, asked = counted(demo)
    picture = image(demo)
    mask = torch.zeros(1, 1, *picture.shape[-2:])
    mask[..., :8] = 1
    uses: dict[str, dict[str, Any]] = {
        "noise": {},
        "karras": {"scheduler": "karras"},
        "image": {"latent": picture, "denoise": 0.5},
        "mask": {"latent": picture, "noise_mask": mask},
        "cfg": {"cfg": 2.0},
        "more steps": {"steps": STEPS + 2},
        "leftover noise": {"last_step": 2, "force_full_denoise": False},
        "from the middle": {"start_step": 2, "latent": picture, "disable_noise": True},
    }
    for number, (what, changes) in enumerate(uses.items(), start=1):
        how = {"cfg": 1.0, "steps": STEPS} | changes
        calls = {"leftover noise": 2, "from the middle": STEPS - 2}.get(what, how["steps"])
        asked.clear()
        k_sample(demo, model, **how)
        assert len(asked) > TEACHER, what
        assert len(files(kept)) == number, what
        asked.clear()
        drawn = k_sample(demo, model, **how)
        assert len(asked) == calls, what
        assert drawn.isfinite().all(), what
        if what == "mask":
            assert (drawn[..., 8:] - picture[..., 8:]).abs().max() < 1e-5


@pytest.mark.parametrize(("steps", "cfg"), [(2, 1.0), (3, 8.0), (10, 1.0), (12, 3.0), (16, 1.0)])
def test_it_learns_few_and_many_steps_at_weak_and_strong_guidance(
    pack: Any, demo: Family, steps: int, cfg: float
) -> None:
    del pack
    model, asked = counted(demo)
    k_sample(demo, model, steps, cfg)
    asked.clear()
    assert k_sample(demo, model, steps, cfg).isfinite().all()
    assert len(asked) == steps


def test_it_learns_on_every_scheduler(pack: Any, demo: Family, kept: Path) -> None:
    import comfy.samplers  # noqa: PLC0415

    model, asked = counted(demo, learning(pack, demo.model, "from N pictures", pictures=1))
    lengths = {}
    for name in comfy.samplers.SCHEDULER_NAMES:
        levels = comfy.samplers.calculate_sigmas(demo.model.get_model_object("model_sampling"), name, STEPS)
        lengths[tuple(levels.tolist())] = name
        k_sample(demo, model, STEPS, 1.0, "amed", name)
        asked.clear()
        assert k_sample(demo, model, STEPS, 1.0, "amed", name).isfinite().all(), name
        assert len(asked) == len(levels) - 1, name
    assert len(files(kept)) == len(lengths), "lists that are the same are one situation"


def test_a_lora_is_another_situation(pack: Any, kept: Path) -> None:
    del pack
    family = make("flux")
    first = k_sample(family, family.model, STEPS, CFG)
    patched = lora(family.model, 1.0)
    model, asked = counted(family, patched)
    other = k_sample(family, model, STEPS, CFG)
    assert len(asked) > TEACHER
    assert not torch.allclose(first, other, rtol=1e-2)
    assert len(files(kept)) == 2


def test_sizes_within_a_factor_are_one_situation(pack: Any, demo: Family, kept: Path) -> None:
    del pack
    channels = demo.latent["samples"].shape[1]
    for width, situations in ((16, 1), (20, 1), (24, 1), (40, 2), (12, 2), (8, 3)):
        k_sample(demo, demo.model, STEPS, 1.0, latent=torch.zeros(1, channels, 16, width))
        assert len(files(kept)) == situations, width


@pytest.mark.parametrize(
    ("changes", "guess"),
    [
        ({"cfg": 3.5}, "cfg 3"),
        ({"cfg": 2.0}, "cfg 3"),
        ({"size": 2}, "another size"),
        ({"cfg": 3.5, "size": 2}, "cfg 3"),
        ({"cfg": 1.9}, None),
        ({"cfg": 1.0}, None),
        ({"steps": STEPS + 1}, None),
        ({"scheduler": "karras"}, None),
        ({"cfg": 3.5, "denoise": 0.5}, None),
    ],
)
def test_a_known_neighbour_is_a_first_guess_that_the_next_run_checks(
    pack: Any, demo: Family, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], guess: str | None
) -> None:
    caplog.set_level(logging.INFO)
    model, asked = counted(demo)
    k_sample(demo, model, STEPS, CFG)
    samples = demo.latent["samples"]
    size = changes.pop("size", 1)
    how = {"steps": STEPS, "cfg": CFG, "latent": samples.repeat(1, 1, 1, size)} | changes
    if guess is None:
        asked.clear()
        k_sample(demo, model, **how)
        assert len(asked) > TEACHER
        return
    listed = pack.nodes.situations.named()
    for run in range(3):
        asked.clear()
        caplog.clear()
        assert k_sample(demo, model, **how).isfinite().all()
        if run == 0:
            assert sentences(caplog) == [
                f"AMED: {STEPS} calls, a first guess. It is from {guess}. "
                "Still learning: the next run teaches it again."
            ]
            assert pack.nodes.situations.named() == listed, "of a guess nothing is learned yet"
        if run == 1:
            assert f"The first guess from {guess} had " in caplog.text
            assert len(pack.nodes.situations.named()) == len(listed) + 1
        assert len(asked) > TEACHER if run == 1 else len(asked) == STEPS, run


def test_a_first_guess_is_nearer_to_the_slow_picture_than_plain_solvers(pack: Any) -> None:
    family, slow, cfg = digits(pack, 10), "ipndm", 2.5
    for _ in range(2):
        k_sample(family, family.model, 5, 2.0)
    guessed = k_sample(family, family.model, 5, cfg)
    converged = k_sample(family, family.model, 60, cfg, slow, "karras")
    pairs = [(s, g) for s in ("euler", "ipndm", "dpmpp_2m") for g in ("karras", "simple", "sgm_uniform")]
    plain = [(k_sample(family, family.model, 5, cfg, *pair) - converged).square().mean() for pair in pairs]
    assert (guessed - converged).square().mean() < min(plain)


def test_prompts_and_seeds_are_no_situations(pack: Any, demo: Family, kept: Path) -> None:
    del pack
    sampled(demo, demo.model, 1, STEPS, "amed", "amed")
    other = Family(demo.model, demo.negative, demo.positive, demo.latent)
    sampled(other, demo.model, 2, STEPS, "amed", "amed")
    assert len(files(kept)) == 1


@pytest.mark.parametrize("name", ["sd15", "sd2_v", "flux", "sd3", "cosmos"])
def test_the_schedulers_list_is_known_again(pack: Any, name: str) -> None:
    import comfy.samplers  # noqa: PLC0415

    sampling = make(name).model.get_model_object("model_sampling")
    is_own = pack.nodes.own_grid.is_own
    for steps in (3, 5, 8, 16):
        whole = comfy.samplers.calculate_sigmas(sampling, "amed", steps)
        assert len(whole) == steps + 1
        assert is_own(whole.tolist(), sampling)
        assert is_own(whole[:3].tolist(), sampling)
        assert is_own(whole[1:].tolist(), sampling)
        assert is_own([*whole[:2].tolist(), 0.0], sampling), "KSamplerAdvanced without leftover noise"
        for denoise in (0.2, 0.35, 0.5, 0.9):
            tail = comfy.samplers.calculate_sigmas(sampling, "amed", int(steps / denoise))[-(steps + 1) :]
            assert is_own(tail.tolist(), sampling)
        for other in ("simple", "karras", "normal", "sgm_uniform", "beta"):
            assert not is_own(comfy.samplers.calculate_sigmas(sampling, other, steps).tolist(), sampling), other


@pytest.mark.parametrize(("name", "even"), [("sd15", False), ("flux", False), ("cosmos", True)])
def test_a_part_changes_over_where_simple_does_or_where_half_of_the_diffusion_is_over(
    pack: Any, name: str, even: bool
) -> None:
    """Even steps in ln(sigma) are no such list: most of them lie where pictures have long been decided."""
    import comfy.samplers  # noqa: PLC0415

    sampling = make(name).model.get_model_object("model_sampling")
    ours = comfy.samplers.calculate_sigmas(sampling, "amed", 6)
    simple = comfy.samplers.calculate_sigmas(sampling, "simple", 6)
    spaced = pack.amed_core.schedules.time_uniform(7, float(sampling.sigmas[0]), float(sampling.sigmas[-1])).float()
    assert torch.allclose(ours[:-1], simple[:-1], rtol=1e-3) is not even
    assert torch.allclose(ours[:-1], spaced[:-1], rtol=1e-3) is even
    assert ours[-1] == 0


def test_two_parts_with_leftover_noise(pack: Any, demo: Family, kept: Path) -> None:
    del pack
    model, asked = counted(demo)
    settings: dict[str, Any] = {"model": model, "noise_seed": 3, "steps": 6, "cfg": 1.0, "sampler_name": "amed"}
    settings |= {"scheduler": "amed", "positive": demo.positive, "negative": demo.negative}

    def part(latent: Any, begin: int, end: int, noise: str, leftover: str) -> Any:
        steps = {"start_at_step": begin, "end_at_step": end, "return_with_leftover_noise": leftover}
        return stock("KSamplerAdvanced", **settings, **steps, add_noise=noise, latent_image=latent)[0]

    with torch.inference_mode():
        slow = part(part(demo.latent, 0, 3, "enable", "enable"), 3, 10000, "disable", "disable")["samples"]
        assert len(files(kept)) == 2
        asked.clear()
        fast = part(part(demo.latent, 0, 3, "enable", "enable"), 3, 10000, "disable", "disable")["samples"]
    assert len(asked) == 6
    plain = k_sample(demo, demo.model, 6, 1.0, "euler", "simple")
    assert (fast - slow).square().mean() < (plain - slow).square().mean()


def through(
    guider: Any, family: Family, sampler: str, scheduler: str, steps: int = STEPS, seed: int = 3
) -> torch.Tensor:
    """What SamplerCustomAdvanced does with noise of a seed."""
    import comfy.samplers  # noqa: PLC0415

    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    noise, chosen = stock("RandomNoise", noise_seed=seed)[0], stock("KSamplerSelect", sampler_name=sampler)[0]
    inputs = {"noise": noise, "guider": guider, "sampler": chosen, "sigmas": sigmas, "latent_image": family.latent}
    with torch.inference_mode():
        drawn: torch.Tensor = stock("SamplerCustomAdvanced", **inputs).args[0]["samples"]
    return drawn


@pytest.mark.parametrize("kind", ["Basic", "DualCFG", "PerpNeg", "two models"])
def test_other_guiders_are_situations_of_their_own(pack: Any, kept: Path, kind: str) -> None:
    family, other = make("flux"), prompt("flux", 4)
    model, asked = counted(family)
    prompts = {"positive": family.positive, "negative": family.negative}
    low, asked_low = counted(make("flux", seed=1))
    guider = {
        "Basic": lambda: stock("BasicGuider", model=model, conditioning=family.positive)[0],
        "DualCFG": lambda: dual_cfg(family, other, model),
        "PerpNeg": lambda: stock("PerpNegGuider", model=model, **prompts, empty_conditioning=other, cfg=2.0)[0],
        "two models": lambda: pack.nodes.AMEDTwoModelsGuider.execute(model, low, *prompts.values(), CFG, 0.9).args[0],
    }[kind]()
    k_sample(family, model, STEPS, CFG)
    through(guider, family, "amed", "amed")
    assert len(files(kept)) == 2
    asked.clear()
    asked_low.clear()
    assert through(guider, family, "amed", "amed").isfinite().all()
    ours = len(asked) + len(asked_low)
    asked.clear()
    asked_low.clear()
    through(guider, family, "euler", "simple")
    assert ours == len(asked) + len(asked_low), "as many calls as Euler's method"


def test_of_two_models_it_learns_weights_that_are_nearer_than_plain_solvers(pack: Any, kept: Path) -> None:
    """The change is where much of the picture is made, and the second model answers otherwise."""
    family = digits(pack, 10)
    low = family.model.clone()
    low.set_model_sampler_post_cfg_function(lambda args: 0.8 * args["denoised"])
    prompts, sigma = (family.positive, family.negative), 2.0
    guider, other = (
        pack.nodes.AMEDTwoModelsGuider.execute(family.model, low, *prompts, CFG, at).args[0] for at in (sigma, 1.0)
    )
    for seed in (1, 1, 2):
        through(guider, family, "amed", "amed", 5, seed)
    through(other, family, "amed", "amed", 5)
    assert len(files(kept)) == 2
    ours = through(guider, family, "amed", "amed", 5, 4)
    converged = through(guider, family, "euler", "karras", 200, 4)
    pairs = [(s, g) for s in ("euler", "ipndm", "dpmpp_2m") for g in ("karras", "simple", "sgm_uniform")]
    plain = [(through(guider, family, *pair, 5, 4) - converged).square().mean() for pair in pairs]
    assert (ours - converged).square().mean() < min(plain)


@pytest.mark.parametrize("guidance", ["ControlNet", "another strength"])
def test_a_control_net_is_another_situation(pack: Any, kept: Path, guidance: str) -> None:
    del pack
    family = make("sd15")
    hint, net = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(8)), control_net()

    def controlled(strength: float) -> dict[str, Any]:
        (positive,) = stock(
            "ControlNetApply", conditioning=family.positive, control_net=net, image=hint, strength=strength
        ).args
        return {"positive": positive}

    k_sample(family, family.model, 3, CFG, **({} if guidance == "ControlNet" else controlled(0.5)))
    k_sample(family, family.model, 3, CFG, **controlled(1.0))
    assert len(files(kept)) == 2


def test_the_frames_of_a_video_teach_as_one_picture(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, shapes = pack.nodes.learning.Learner, []
    learn = learner.learn
    monkeypatch.setattr(pack.nodes.learning, "frames_are_batch", lambda guider: True)
    monkeypatch.setattr(
        learner, "learn", lambda self, denoiser, x, *how: [shapes.append(x.shape), learn(self, denoiser, x, *how)]
    )
    family = digits(pack, 3)
    model, asked = counted(family)
    k_sample(family, model, STEPS, 1.0)
    asked.clear()
    assert k_sample(family, model, STEPS, 1.0).isfinite().all()
    assert len(asked) == STEPS
    assert shapes == [(1, *family.latent["samples"].shape)]


# Control


def test_never_is_ipndm_bit_by_bit_and_keeps_nothing(pack: Any, demo: Family, kept: Path) -> None:
    never = learning(pack, demo.model, "never")
    drawn = [k_sample(demo, never, STEPS, 1.0, "amed", "karras") for _ in range(2)]
    assert (drawn[0] == drawn[1]).all()
    assert not files(kept)
    theirs = k_sample(demo, demo.model, STEPS, 1.0, "ipndm", "karras")
    torch.testing.assert_close(drawn[0], theirs, rtol=1e-3, atol=1e-4)


def test_after_the_last_lesson_a_seed_gives_the_same_picture_for_ever(pack: Any, demo: Family) -> None:
    model, asked = counted(demo, learning(pack, demo.model, "from N pictures", pictures=3))
    for seed in range(3):  # two pictures, none, two pictures
        sampled(demo, model, seed, STEPS, "amed", "amed")
    asked.clear()
    drawn = [sampled(demo, model, 9, STEPS, "amed", "amed") for _ in range(3)]
    assert len(asked) == 3 * STEPS
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == drawn[2]).all()


def test_forgetting_is_of_one_model(pack: Any, demo: Family, kept: Path) -> None:
    flux = make("flux")
    k_sample(demo, demo.model, STEPS, 1.0)
    k_sample(demo, demo.model, STEPS + 1, 1.0)
    k_sample(flux, flux.model, STEPS, 1.0)
    assert len(files(kept)) == 3
    model, asked = counted(demo, learning(pack, demo.model, forget=True))
    assert len(files(kept)) == 1
    k_sample(demo, model, STEPS, 1.0)
    assert len(asked) > TEACHER


def test_other_samplers_still_need_a_predictor(pack: Any, demo: Family) -> None:
    del pack
    with pytest.raises(ValueError, match="AMED Apply Predictor"):
        k_sample(demo, demo.model, STEPS, 1.0, "amed_ipndm", "karras")


def test_it_says_what_it_does(pack: Any, demo: Family, caplog: pytest.LogCaptureFixture) -> None:
    del pack
    caplog.set_level(logging.INFO)
    alone = {"latent": torch.zeros_like(demo.latent["samples"][:1])}
    said = []
    for _ in range(4):
        caplog.clear()
        k_sample(demo, demo.model, STEPS, 1.0, **alone)
        said.append([message.removeprefix("AMED: ") for message in sentences(caplog)])
    assert said[0][0].startswith(f"learning 1 of 8: {TEACHER} + up to ")
    assert said[0][0].endswith(f" calls once, then {STEPS}.")
    assert said[0][-1] == f"learned from 1; the next picture takes {STEPS} calls."
    assert said[1] == [f"{STEPS} calls, learned from 1 picture. Still learning: the next run teaches it again."]
    assert said[2][0].startswith("learning 2 of 8: ")
    assert "of the best plain sampler's error (held out)" in said[3][0] or "plain" in said[3][0]
    assert all(len(message.split(". ")[0]) <= 60 for messages in said for message in messages)


@pytest.mark.parametrize(
    ("calls", "teacher", "pictures"), [(5, 24, 1), (16, 100, 1), (16, 24, 10)], ids=["usual", "longest", "batch"]
)
def test_the_first_words_are_short(pack: Any, calls: int, teacher: int, pictures: int) -> None:
    said = begun(pack, calls, teacher).begins(pictures)
    assert len(said) <= 60, said


def begun(pack: Any, calls: int, teacher: int = TEACHER, **settings: Any) -> Any:
    """What a situation of which nothing is known yet says of itself."""
    learning = pack.nodes.learning
    facts = pack.amed_core.samplers.ModelFacts(0.03, 14.6)
    config = pack.amed_core.samplers.student_config("amed_multistep", calls, facts)
    learner = learning.Learner(config, teacher_calls=teacher)
    return learning.Learned(None, Path(), learner, learning.Learning(**settings))


def test_it_says_why_it_stops(pack: Any, demo: Family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one = begun(pack, 5)
    one.learner.pictures = 8
    assert "after 8 pictures" in one.finished()
    one.learner.good_in_a_row = 2
    assert "2 in a row were at least 20% better" in one.finished()
    two = learning(pack, demo.model, "from N pictures", pictures=2)
    for _ in range(2):
        caplog.clear()
        k_sample(demo, two, STEPS, 1.0)
        assert "Finished after 2 pictures, as AMED Learn says." in sentences(caplog)[-1]


def test_callback_and_bar_count_and_previews_are_of_the_picture(
    pack: Any, demo: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils  # noqa: PLC0415

    del pack
    heard_of: list[tuple[int, int, torch.Tensor]] = []
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append((value, total))
    )
    model, asked = counted(demo)
    drawn = k_sample(demo, model, STEPS, 1.0, callback=lambda i, x0, x, n: heard_of.append((i, n, x0)))
    assert [(i, n) for i, n, _ in heard_of] == [(i, STEPS) for i in range(STEPS)]
    torch.testing.assert_close(heard_of[-1][2].cpu(), drawn, rtol=1e-3, atol=1e-3)
    assert shown[-1] == (len(asked), len(asked))
    assert {total for value, total in shown if value > TEACHER} == {len(asked)}, "known once the slow run is over"
    assert [value for value, _ in shown] == sorted(value for value, _ in shown)


@pytest.mark.parametrize("name", ["digits", "flux"])
def test_what_was_learned_is_a_predictor_like_any_other(
    pack: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import folder_paths  # noqa: PLC0415

    nodes = pack.nodes
    family = digits(pack, 8) if name == "digits" else make(name)
    teach = learning(pack, family.model, "from N pictures", pictures=1)
    k_sample(family, teach, STEPS, CFG)
    drawn = k_sample(family, teach, STEPS, CFG)
    options = nodes.AMEDLoadPredictor.define_schema().inputs[0].options
    (listed,) = [option for option in options if option.startswith("learned/")]
    assert "4 calls" in listed
    assert "cfg 3" in listed
    assert nodes.AMEDLoadPredictor.validate_inputs(listed) is True
    assert nodes.AMEDLoadPredictor.fingerprint_inputs(listed)
    made, _ = nodes.AMEDLoadPredictor.execute(listed).args
    applied, *_ = nodes.AMEDApplyPredictor.execute(family.model, made).args
    again = k_sample(family, applied, STEPS, CFG, "amed_multistep")
    scale = float(drawn.abs().max())
    torch.testing.assert_close(again, drawn, rtol=1e-2, atol=1e-2 * scale), "but for interpolated timesteps"
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path / "predictors")])
    (saved,) = nodes.AMEDSavePredictor.execute(made, "learned_set").args
    loaded = pack.amed_core.files.load_predictor(tmp_path / "predictors" / saved)
    assert (loaded.weights == made.predictor.weights).all()
    files(kept)[0].write_bytes(b"no file of ours")
    assert listed not in nodes.AMEDLoadPredictor.define_schema().inputs[0].options


# What can go wrong


@pytest.mark.trust("sampling")
@pytest.mark.parametrize("call", [10, TEACHER + 6])
def test_cancelled_it_keeps_nothing(pack: Any, demo: Family, kept: Path, call: int) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    del pack
    model, made = stopped_at(demo, call)
    with pytest.raises(mm.InterruptProcessingException):
        k_sample(demo, model, STEPS, 1.0)
    assert not files(kept)
    made.clear()
    made.extend([0] * call)
    assert k_sample(demo, model, STEPS, 1.0).isfinite().all()
    assert len(files(kept)) == 1


def failing(family: Family, calls: range, error: Exception | None = None) -> Any:
    """The MODEL, which answers NaN, or raises an error, in these of its calls."""
    model, made = family.model.clone(), []

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) in calls and error is not None:
            raise error
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer * float("nan") if len(made) in calls else answer

    model.set_model_unet_function_wrapper(wrapper)
    return model


ERRORS = [None, torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("a kernel")]


@pytest.mark.trust("sampling")
@pytest.mark.parametrize("error", ERRORS, ids=["NaN", "memory", "kernel"])
def test_if_learning_fails_the_slow_picture_is_there(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    del pack
    drawn = k_sample(demo, failing(demo, range(TEACHER + 1, 10**6), error), STEPS, 1.0)
    assert "the slow picture, nothing learned" in caplog.text
    assert not files(kept)
    assert (drawn == k_sample(demo, demo.model, STEPS, 1.0)).all()


@pytest.mark.trust("sampling")
@pytest.mark.parametrize("begin", [1, TEACHER + 1], ids=["slow run", "passes"])
def test_what_failed_is_not_tried_again_until_it_is_forgotten(
    pack: Any, demo: Family, caplog: pytest.LogCaptureFixture, begin: int
) -> None:
    made: list[int] = []
    model = demo.model.clone()

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) == begin:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    model.set_model_unet_function_wrapper(wrapper)
    drawn = []
    for run in range(3):
        caplog.clear()
        before = len(made)
        drawn.append(k_sample(demo, model, STEPS, 1.0))
        if run:
            assert caplog.messages[0].startswith(f"AMED: {STEPS} plain calls, nothing learned. That failed before (")
            assert "OutOfMemoryError" in caplog.text
            assert len(made) - before == STEPS
    assert (drawn[1] == drawn[2]).all()
    before = len(made)
    k_sample(demo, learning(pack, model, forget=True), STEPS, 1.0)
    assert len(made) - before > TEACHER


@pytest.mark.trust("sampling")
@pytest.mark.parametrize("error", ERRORS, ids=["NaN", "memory", "kernel"])
def test_if_the_slow_run_fails_the_plain_picture_is_there(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    drawn = k_sample(demo, failing(demo, range(5, 6 if error else TEACHER + 1), error), STEPS, 1.0)
    assert "plain calls, nothing learned" in caplog.text
    assert not files(kept)
    never = learning(pack, demo.model, "never")
    assert (drawn == k_sample(demo, never, STEPS, 1.0)).all()


@pytest.mark.trust("sampling")
def test_a_later_failure_leaves_what_was_learned(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del pack
    shared = failing(demo, range(0))
    for _ in range(2):
        k_sample(demo, shared, STEPS, 1.0)
    (file,) = files(kept)
    before = file.read_bytes()
    k_sample(demo, failing(demo, range(TEACHER + 1, 10**6)), STEPS, 1.0)
    assert file.read_bytes() == before
    caplog.clear()
    assert k_sample(demo, shared, STEPS, 1.0).isfinite().all()
    assert "Nothing more is learned: that failed before" in caplog.text


@pytest.mark.trust("sampling")
@pytest.mark.parametrize("call", [5, TEACHER + 3], ids=["slow run", "passes"])
def test_a_model_that_is_changed_meanwhile_teaches_nothing(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, call: int
) -> None:
    del pack
    model, made = demo.model.clone(), []

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) == call:
            model.model_options["sampler_cfg_function"] = lambda args: args["cond"]
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    model.set_model_unet_function_wrapper(wrapper)
    assert k_sample(demo, model, STEPS, 1.0).isfinite().all()
    assert "changed meanwhile" in caplog.text
    assert not files(kept)


@pytest.mark.trust("sampling")
def test_a_fault_in_any_call_leaves_a_picture_or_is_named_and_the_next_run_is_well(
    pack: Any, demo: Family, kept: Path, trials: Trials
) -> None:
    """While it learns: what is kept afterwards is what is kept without a fault, or nothing."""
    model, asked = counted(demo)
    well = k_sample(demo, model, STEPS, 1.0)
    (file,) = files(kept)
    whole = pack.amed_core.files.load_state(file)["learner"]
    chance = random.Random(0)
    for call in sorted(chance.sample(range(1, len(asked) + 1), trials.many(1, len(asked)))):
        for error in ERRORS:
            learning(pack, demo.model, forget=True)
            where = f"{'NaN' if error is None else error} at call {call}"
            drawn = k_sample(demo, failing(demo, range(call, call + 1), error), STEPS, 1.0)
            trials.held(where, bool(drawn.isfinite().all()), "the picture is not finite")
            learned = [pack.amed_core.files.load_state(one)["learner"] for one in files(kept)]
            trials.held(where, all(alike(one, whole) for one in learned), "another set is kept")
            learning(pack, demo.model, forget=True)
            trials.held(where, bool((k_sample(demo, demo.model, STEPS, 1.0) == well).all()), "the next run is another")


def alike(one: Any, other: Any) -> bool:
    """Whether two states are the same but for rounding, which a halved batch changes."""
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, rtol=1e-2, atol=1e-4)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == pytest.approx(other, rel=1e-2)) if isinstance(one, float) else bool(one == other)


@pytest.mark.trust("states")
def test_a_flipped_bit_in_what_was_learned_is_seen_wherever_it_is(
    pack: Any, demo: Family, kept: Path, trials: Trials
) -> None:
    """It is told, and learned anew."""
    k_sample(demo, demo.model, STEPS, 1.0)
    (file,) = files(kept)
    whole, chance = file.read_bytes(), random.Random(0)
    state = str(pack.amed_core.files.load_state(file))
    for _ in range(trials.many(50, 3000)):
        bit = chance.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(data))
        found = pack.nodes.situations.read(file)
        trials.held(f"bit {bit}", not found or str(found) == state, "goes unnoticed")


def cut(pack: Any, file: Path) -> None:
    del pack
    file.write_bytes(file.read_bytes()[:1000])


def nan(pack: Any, file: Path) -> None:
    state = pack.amed_core.files.load_state(file)
    for one in state["learner"]["candidates"]:
        one["learned"]["weights"][0, 0] = torch.nan
    pack.amed_core.files.save_state(file, state)


def of_another_kind(pack: Any, file: Path) -> None:
    pack.amed_core.files.save_state(file, {"fit": "another"})


def of_another_run(pack: Any, file: Path) -> None:
    state = pack.amed_core.files.load_state(file)
    state["learner"]["usual_calls"] += 1
    pack.amed_core.files.save_state(file, state)


@pytest.mark.trust("states")
@pytest.mark.parametrize("damage", [cut, nan, of_another_kind, of_another_run])
def test_a_damaged_file_is_told_and_learning_begins_anew(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    model, asked = counted(demo)
    k_sample(demo, model, STEPS, 1.0)
    (file,) = files(kept)
    damage(pack, file)
    if damage is not of_another_run:  # AMED Load need not know of which run it is
        for name in pack.nodes.situations.named():
            with pytest.raises(ValueError, match="damaged"):
                pack.nodes.AMEDLoadPredictor.execute(name)
    asked.clear()
    assert k_sample(demo, model, STEPS, 1.0).isfinite().all()
    assert "learning begins anew" in caplog.text
    assert len(asked) > TEACHER
    asked.clear()
    k_sample(demo, model, STEPS, 1.0)
    assert len(asked) == STEPS


@pytest.mark.trust("states")
def test_if_what_was_learned_cannot_be_written_the_slow_picture_is_there(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(pack.amed_core.files.os, "replace", full)
        drawn = k_sample(demo, demo.model, STEPS, 1.0)
    assert "the slow picture, nothing learned. OSError. No space left" in caplog.text
    assert not list(kept.iterdir()), "neither whole nor in part"
    learning(pack, demo.model, forget=True)
    assert (drawn == k_sample(demo, demo.model, STEPS, 1.0)).all()
    (file,) = files(kept)
    before = file.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(pack.amed_core.files.os, "replace", full)
        assert k_sample(demo, demo.model, STEPS, 1.0).isfinite().all()
    assert "could not be kept" in caplog.text
    assert file.read_bytes() == before
    assert list(kept.iterdir()) == [file]


def test_of_many_files_the_one_used_longest_ago_goes(pack: Any, demo: Family, kept: Path) -> None:
    most = pack.nodes.situations.MOST_FILES
    kept.mkdir(parents=True)
    for number in range(most):
        file = kept / f"other-{number}-10.safetensors"
        file.write_bytes(b"")
        os.utime(file, (number + 1, number + 1))
    k_sample(demo, demo.model, STEPS, 1.0)
    assert len(files(kept)) == most
    assert not (kept / "other-0-10.safetensors").exists()
    assert (kept / "other-1-10.safetensors").exists()


def test_a_long_path_is_kept_in_half_precision_and_teaches(
    pack: Any, demo: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_learning, samples = pack.nodes.learning, demo.latent["samples"]
    whole, half = (nodes_learning.path_bytes(samples, TEACHER, half=half) for half in (False, True))
    assert 2 * half == whole
    paths = []
    learn = nodes_learning.Learner.learn
    monkeypatch.setattr(
        nodes_learning.Learner,
        "learn",
        lambda self, x, start, path, *how: [paths.append(path), learn(self, x, start, path)],
    )
    slow = k_sample(demo, learning(pack, demo.model, "from N pictures", pictures=1), STEPS, 1.0)
    monkeypatch.setattr(nodes_learning, "MOST_BYTES", half)
    learning(pack, demo.model, forget=True)
    model, asked = counted(demo)
    assert (k_sample(demo, model, STEPS, 1.0) == slow).all(), "the picture itself is in full precision"
    assert [path.x.nbytes + path.slopes.nbytes for path in paths] == [whole, half]
    asked.clear()
    assert k_sample(demo, model, STEPS, 1.0).isfinite().all()
    assert len(asked) == STEPS


def test_too_large_a_batch_is_drawn_plainly_and_says_so(
    pack: Any, demo: Family, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack.nodes.learning, "MOST_BYTES", 1000)
    model, asked = counted(demo)
    k_sample(demo, model, STEPS, 1.0)
    assert len(asked) == STEPS
    assert "over 2 GB" in caplog.text
    assert not files(kept)
