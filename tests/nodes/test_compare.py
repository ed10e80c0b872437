"""AMED Compare: what it draws is what KSampler draws, in equally many calls, and what it says of it is so."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make
from toys import flat, heard, stopped_at

from amed_core.files import load_predictors

STEPS, SEEDS = 5, (4, 5)
AGAINST = "dpmpp_2m karras, dpm_2 karras, euler simple"
SHIPPED = Path(__file__).parents[2] / "predictors"


@pytest.fixture(scope="module")
def demo(pack: Any) -> Family:
    """The digits model, asked for one digit."""
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("7", 3).args
    return Family(model, positive, negative, latent)


def shipped(pack: Any, name: str = "digits_amed_multistep_5") -> Any:
    return pack.nodes.values.NotedPredictor.of(load_predictors(SHIPPED / f"{name}.safetensors"), {})


def compared(pack: Any, family: Family, **changes: Any) -> Any:
    """A finished comparison."""
    inside = pack.nodes.comparison
    settings = {"steps": "5", "against": AGAINST, "predictor": None, "cfg": 1.0, "seeds": SEEDS, "teacher_calls": 30}
    settings |= changes
    model = settings.pop("model", family.model)
    with torch.inference_mode():
        made = inside.Comparison(
            model,
            family.positive,
            family.negative,
            family.latent,
            settings["seeds"],
            settings["cfg"],
            inside.steps_of(settings["steps"]),
            inside.pairs_of(settings["against"]),
            inside.Ours.of(model, settings["predictor"]),
            settings["teacher_calls"],
            lambda text: None,
        )
        made.run()
    return made


def executed(pack: Any, family: Family, **changes: Any) -> Any:
    """The node's output, with its inputs as ComfyUI's executor hands them on."""
    inputs = {"model": family.model, "positive": family.positive, "negative": family.negative}
    inputs |= {"latent_image": family.latent, "seed": 4, "cfg": 1.0, "steps": "5", "pictures": 2, "against": AGAINST}
    inputs |= {"teacher_calls": 30} | changes
    with torch.inference_mode():
        return pack.nodes.AMEDCompare.execute(**inputs)


def by_k_sampler(family: Family, model: Any, seed: int, steps: int, sampler: str, scheduler: str) -> torch.Tensor:
    """One picture of a seed."""
    import comfy.sample  # noqa: PLC0415

    latent = family.latent["samples"][:1]
    about = (1.0, sampler, scheduler, family.positive, family.negative, latent)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, seed)
        return flat(comfy.sample.sample(model, noise, steps, *about, seed=seed, disable_pbar=True))


def learns_from(pack: Any, model: Any, pictures: int) -> Any:
    (made,) = pack.nodes.AMEDLearn.execute(model, "from N pictures", pictures, 24, False).args
    return made


# What is drawn


@pytest.mark.parametrize("name", ["digits_amed_multistep_5", "digits_amed_5", "digits_amed_ipndm_5"])
def test_every_row_is_what_k_sampler_draws_of_that_seed_to_the_bit(pack: Any, demo: Family, name: str) -> None:
    made = compared(pack, demo, predictor=shipped(pack, name))
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, shipped(pack, name)).args
    ways = [("dpmpp_2m", "karras", 5), ("dpm_2", "karras", 3), ("euler", "simple", 5)]  # dpm_2 has 2 calls a step
    for n, seed in enumerate(SEEDS):
        ours = by_k_sampler(demo, applied, seed, STEPS, made.ours.sampler, "amed")
        assert torch.equal(made.mine(STEPS).latents[n], ours)
        for row, (sampler, scheduler, steps) in zip(made.of(STEPS), ways, strict=True):
            assert torch.equal(row.latents[n], by_k_sampler(demo, demo.model, seed, steps, sampler, scheduler))


def test_a_predictor_on_the_model_is_the_one_that_is_compared(pack: Any, demo: Family) -> None:
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(demo.model, shipped(pack)).args
    carried, given = compared(pack, demo, model=applied), compared(pack, demo, predictor=shipped(pack))
    assert carried.mine(STEPS).squares == given.mine(STEPS).squares


def test_every_method_has_equally_many_true_calls(pack: Any, demo: Family) -> None:
    asked: list[Any] = []
    made = compared(pack, demo, model=heard(demo.model, asked.append), predictor=shipped(pack), steps="3 5")
    assert made.meter.done == len(asked), "without guidance a call is one pass"
    for calls in (3, 5):
        for way in (*made.ways[calls], made._taught(calls)):
            begun = len(asked)
            made._draw(way, SEEDS)
            assert len(asked) - begun == calls * len(SEEDS), way.name


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_calls_are_counted_whatever_they_take_of_the_network(pack: Any, demo: Family, cfg: float) -> None:
    made = compared(pack, demo, cfg=cfg, predictor=shipped(pack))
    assert made.unit == 1
    assert {one.calls for one in (*made.of(STEPS), made.mine(STEPS))} == {STEPS}


def test_a_pair_that_cannot_take_so_many_calls_is_left_out_and_named(pack: Any, demo: Family) -> None:
    made = compared(pack, demo, steps="4", predictor=shipped(pack))
    assert [one.name for one in made.of(4)] == ["dpmpp_2m karras", "euler simple"]
    assert made.lacking == ["dpm_2 karras cannot take 4 calls"]
    with pytest.raises(ValueError, match=r"None of the pairs in against .* can take 4 model calls"):
        compared(pack, demo, steps="4", against="dpm_2 karras")


def test_without_a_predictor_it_is_taught_on_other_seeds_and_then_drawn(pack: Any, demo: Family, user: Path) -> None:
    asked: list[Any] = []
    made = compared(pack, demo, model=heard(demo.model, asked.append))
    pictures, calls = made.taught[STEPS]
    assert pictures == 2
    assert calls > 2 * 24
    assert list((user.parent / "amed_learned").glob("*.safetensors"))
    assert made.mine(STEPS).calls == STEPS, "no compared picture taught"
    learned = learns_from(pack, demo.model, 2)
    for n, seed in enumerate(SEEDS):
        theirs = by_k_sampler(demo, heard(learned, asked.append), seed, STEPS, "amed", "amed")
        assert torch.equal(made.mine(STEPS).latents[n], theirs)
    again = compared(pack, demo, model=heard(demo.model, asked.append))
    assert again.taught[STEPS] == (0, 2 * STEPS), "it knows enough"
    assert again.mine(STEPS).squares == made.mine(STEPS).squares
    assert "nothing was taught here" in pack.nodes.compare.learned(again)


def test_amed_learn_decides_how_much_is_taught(pack: Any, demo: Family) -> None:
    assert compared(pack, demo, model=learns_from(pack, demo.model, 1)).taught[STEPS][0] == 1
    (never,) = pack.nodes.AMEDLearn.execute(demo.model, "never", 4, 24, False).args
    made = compared(pack, demo, model=never)
    assert made.taught == {}
    assert torch.equal(made.mine(STEPS).latents[0], by_k_sampler(demo, never, SEEDS[0], STEPS, "amed", "amed"))
    assert "plain calls" in pack.nodes.compare.learned(made)


# What is said


def test_the_verdict_counts_the_calls_of_the_best_pair_for_the_same_error(pack: Any, demo: Family) -> None:
    made = compared(pack, demo, predictor=shipped(pack))
    best, mine, equal = made.best(STEPS), made.mine(STEPS), made.equal(STEPS)
    assert mine.error < best.error == min(one.error for one in made.of(STEPS))
    ladder = dict(made.ladders[STEPS])
    below, above = max(n for n in ladder if n <= equal), min(n for n in ladder if n >= equal)
    assert ladder[above] <= mine.error <= ladder[below]
    said = pack.nodes.compare.verdict(made, STEPS)
    assert said.startswith("5 calls of AMED are as near to the teacher as ")
    assert f"error {mine.error:.3g} against {best.error:.3g}" in said


def test_a_worse_predictor_yields_that_stock_is_better(pack: Any, demo: Family) -> None:
    worse = copy.deepcopy(shipped(pack))
    with torch.no_grad():
        for weights in worse.predictor.parameters():
            weights.add_(0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    made = compared(pack, demo, predictor=worse)
    said = pack.nodes.compare.verdict(made, STEPS)
    assert f"5 calls of {made.best(STEPS).name} are nearer to the teacher than 5 of AMED: stock is better here" in said
    assert made.mine(STEPS).error > made.best(STEPS).error
    assert max(calls for _, calls in made.results) == STEPS, "no ladder is needed to know that"


def test_the_node_hands_out_sheet_plot_and_table_and_shows_the_sheet(pack: Any, demo: Family) -> None:
    out = executed(pack, demo, predictor=shipped(pack), steps="3 5")
    sheet, plot, text = out.args
    first = text.splitlines()
    assert first[0].startswith("3 calls of ")
    assert first[1].startswith("5 calls of AMED are as near to the teacher as ")
    assert "2 pictures, seeds 4 to 5" in first[2]
    assert "AMED (amed_multistep)" in first[3]
    for image in (sheet, plot):
        assert image.ndim == 4
        assert image.shape[-1] == 3
        assert 0 <= image.min() < image.max() <= 1
    assert len(out.ui.as_dict()["images"]) == 1


def test_the_sheet_has_a_row_for_every_method_and_a_block_for_every_number_of_steps(pack: Any, demo: Family) -> None:
    def height(**changes: Any) -> int:
        return int(executed(pack, demo, predictor=shipped(pack), **changes).args[0].shape[1])

    usual = height()
    row = (usual - height(against="euler simple")) / 2
    assert row >= 240, "of the side of a picture"
    assert height(steps="3 5") - usual >= 5 * row, "teacher, three pairs and AMED once more"


def test_the_teachers_row_has_the_teachers_pictures_and_no_difference(pack: Any, demo: Family) -> None:
    made = compared(pack, demo, predictor=shipped(pack))
    (_, _, _, _, vae) = pack.nodes.AMEDDemoModel.execute("7", 1).args
    decode = pack.nodes.compare.Decoder(demo.model, vae)
    for latent in (*made.slow.latents, *made.mine(STEPS).latents):
        torch.testing.assert_close(decode(latent), vae.decode(latent)[0])


# What is refused


@pytest.mark.parametrize(
    ("against", "why"),
    [
        ("dpmpp_2m", "is no sampler with a scheduler"),
        ("dpmpp_2n karras", r"there is no sampler 'dpmpp_2n'. Did you mean dpmpp_2m\? The samplers are: euler, "),
        ("euler karas", r"there is no scheduler 'karas'. Did you mean karras\? The schedulers are: "),
        ("euler simple, euler_ancestral karras", "euler_ancestral adds noise of its own"),
        ("dpmpp_sde karras", "dpmpp_sde adds noise of its own"),
        ("lcm simple", "lcm adds noise of its own"),
        ("dpm_adaptive karras", "as many model calls as it likes"),
        ("euler_cfg_pp simple", "solves another equation"),
        ("amed simple", "AMED's own sampler"),
        ("euler amed", "AMED's own scheduler"),
        (" , ", "is empty"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused_before_anything_runs(pack: Any, against: str, why: str) -> None:
    said = pack.nodes.AMEDCompare.validate_inputs(steps="5", against=against)
    assert isinstance(said, str)
    assert 'against of "AMED Compare"' in said
    with pytest.raises(ValueError, match=why):
        pack.nodes.comparison.pairs_of(against)


def test_every_deterministic_stock_sampler_is_taken(pack: Any) -> None:
    names = ("euler", "heun", "dpm_2", "lms", "ipndm", "ipndm_v", "deis", "uni_pc", "uni_pc_bh2", "dpmpp_2m", "ddim")
    text = ", ".join(f"{name} karras" for name in names)
    assert pack.nodes.AMEDCompare.validate_inputs(steps="3, 5-7", against=text) is True
    assert pack.nodes.comparison.steps_of("8 3,5 - 6") == (3, 5, 6, 8)


@pytest.mark.parametrize("steps", ["", "five", "1", "5 0"])
def test_steps_that_are_none_are_refused(pack: Any, steps: str) -> None:
    said = pack.nodes.AMEDCompare.validate_inputs(steps=steps, against=AGAINST)
    assert 'steps of "AMED Compare"' in said


def test_a_teacher_of_too_few_calls_is_refused_before_anything_runs(pack: Any) -> None:
    check = pack.nodes.AMEDCompare.validate_inputs
    assert "A teacher of 10 calls cannot judge 5 calls" in check(steps="3, 5", against=AGAINST, teacher_calls=10)
    assert check(steps="3", against=AGAINST, teacher_calls=10) is True
    assert check(against=AGAINST, teacher_calls=10) is True, "of steps that another node says nothing is known"


def test_what_is_not_of_this_model_is_refused_before_anything_runs(pack: Any, demo: Family) -> None:
    asked: list[Any] = []
    model, vae = heard(demo.model, asked.append), pack.nodes.AMEDDemoCheckpoint.execute().args[2]
    with pytest.raises(ValueError, match="The VAE decodes latents of 8 channels, and this model's have 1"):
        executed(pack, demo, model=model, vae=vae, predictor=shipped(pack))
    with pytest.raises(ValueError, match="made for another model"):
        executed(pack, demo, model=model, predictor=shipped(pack, "pictures_amed_multistep"))
    with pytest.raises(ValueError, match=r"A teacher of 10 calls cannot judge 5 calls. Set teacher_calls to 0"):
        executed(pack, demo, model=model, predictor=shipped(pack), teacher_calls=10)
    assert not asked


# Other latents, and Cancel


@pytest.mark.parametrize("name", ["wan21", "ltxav", "stable_audio", "sd15"])
def test_other_latents_are_compared_one_at_a_time(pack: Any, name: str) -> None:
    family = make(name)
    asked: list[Any] = []
    sheet, _, text = executed(pack, family, model=heard(family.model, lambda p: asked.append(len(p["input"])))).args
    assert sheet.isfinite().all()
    assert "nan" not in text
    assert set(asked) == {1}, "whatever the batch of the latent"


@pytest.mark.parametrize("call", [1, 20, 40, 75])
def test_cancel_stops_before_the_next_call(pack: Any, demo: Family, call: int) -> None:
    """In the teacher, in a stock row, and while AMED learns."""
    import comfy.model_management as mm  # noqa: PLC0415

    model, made = stopped_at(demo, call)
    with pytest.raises(mm.InterruptProcessingException):
        compared(pack, demo, model=model, seeds=SEEDS[:1])
    assert len(made) == call


def test_a_stock_sampler_that_fails_is_named(pack: Any, demo: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.k_diffusion.sampling  # noqa: PLC0415

    usual, runs = comfy.k_diffusion.sampling.sample_euler, []

    def fails(model: Any, x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        runs.append(x.shape)
        if x.shape[-1] == 16:  # the model of nothing, that it is tried on, is smaller
            raise RuntimeError("no such levels")
        drawn: torch.Tensor = usual(model, x, *more, **options)
        return drawn

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", fails)
    with pytest.raises(ValueError, match=r"euler simple fails on this model \(RuntimeError: no such levels\)"):
        compared(pack, demo, predictor=shipped(pack), against="euler simple")


def test_nan_from_one_method_is_an_infinite_error_and_does_not_stop_the_others(pack: Any, demo: Family) -> None:
    result = pack.nodes.comparison.Result("one", 5, (), (0.1, math.nan), 1.0)
    assert result.error == math.inf
    made = compared(pack, demo, predictor=shipped(pack))
    made.results["euler simple", 5] = pack.nodes.comparison.Result(
        "euler simple", 5, tuple(latent * math.nan for latent in made.slow.latents), (math.nan,) * 2, 1.0
    )
    decode = pack.nodes.compare.Decoder(demo.model, None)
    said = pack.nodes.compare.verdict(made, STEPS)
    assert said.startswith("5 calls of AMED are as near")
    assert pack.nodes.compare._sheet(made, [said], decode, 4.0).width > 0
    assert "inf" in pack.nodes.compare.table(made, [said], 1.0)
