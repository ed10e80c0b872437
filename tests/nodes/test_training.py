"""AMED Train Predictor: what is left behind, going on, prompts, guidance, inputs without effect, and what is shown."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make, prompt
from stock import stock
from toys import everything_of, goes_on, heard, in_inference_mode, k_sample, stopped_at, survives_little_memory, train

SHORT = {"steps": 4, "teacher_calls": 8, "trajectories": 1, "held_out": 1}
SCALE = 3.0


@pytest.fixture
def flux(pack: Any) -> Family:
    del pack
    return make("flux")


# What is left behind


def test_the_model_is_byte_for_byte_as_it_was(pack: Any, flux: Family) -> None:
    assert next(in_inference_mode(flux).model.model.parameters()).is_inference()
    k_sample(flux, flux.model, 1, SCALE, "euler", "simple")  # ComfyUI's own first load leaves its marks
    before = everything_of(flux.model)
    train(pack, flux, **SHORT)
    assert everything_of(flux.model) == before


@pytest.mark.parametrize("call", [25, 300])
@pytest.mark.trust("resumed")
def test_cancelled_within_one_call_it_goes_on_where_it_was(pack: Any, flux: Family, user: Path, call: int) -> None:
    goes_on(pack, flux, user, call, **SHORT)


@pytest.mark.trust("states")
def test_a_damaged_state_is_not_used(pack: Any, flux: Family, user: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = stopped_at(flux, 20)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, **SHORT)
    (state,) = user.glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    assert "before it was stopped" not in train(pack, flux, model, **SHORT)[2]


@pytest.mark.trust("states")
def test_other_settings_do_not_go_on_from_a_state(pack: Any, flux: Family, user: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = stopped_at(flux, 20)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, **SHORT)
    for other in ({"seed": 1}, {"teacher_calls": 9}, {"positives": [prompt("flux", 9)]}):
        assert "before it was stopped" not in train(pack, flux, model, **(SHORT | other))[2]
    assert len(list(user.glob("*.safetensors"))) == 1


@pytest.mark.trust("training")
def test_running_out_of_memory_halves_the_batch_and_goes_on(pack: Any, flux: Family) -> None:
    survives_little_memory(pack, flux, steps=3)


# Prompts and guidance


def test_a_list_of_prompts_is_trained_on_and_every_fourth_judges(pack: Any, flux: Family) -> None:
    prompts, marks = [prompt("flux", seed) for seed in range(20, 25)], []

    def hear(parameters: Any) -> None:
        marks.extend(round(float(row.sum()), 3) for row in parameters["c"]["c_crossattn"].cpu())

    made, _, report, _ = train(
        pack, flux, heard(flux.model, hear), positives=prompts, steps=3, trajectories=4, held_out=2, cfg=1.0
    )
    mark = [round(float(p[0][0][0].sum()), 3) for p in prompts]
    assert set(marks) == set(mark), "at cfg 1 every call is for one of the prompts"
    assert made.notes["training"]["prompts"] == 5
    assert made.notes["training"]["trajectories"] >= 4
    assert pack.nodes.training_job.split(5) == ((0, 1, 2, 4), (3,))
    assert pack.nodes.training_job.split(2) == ((0, 1), (0, 1))
    assert report


def test_prompts_come_from_lines_or_from_a_file(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths  # noqa: PLC0415

    class Clip:
        def tokenize(self, text: str) -> str:
            return text.upper()

        def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
            return [[tokens, {}]]

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "many.txt").write_text("a cat\n\n  a dog \n")
    encoded = pack.nodes.training.encoded
    assert encoded(Clip(), "a cat\na dog") == [[["A CAT", {}]], [["A DOG", {}]]]
    assert encoded(Clip(), "many.txt") == encoded(Clip(), "a cat\na dog")
    assert encoded(None, "  ") == []
    with pytest.raises(ValueError, match="connect clip"):
        encoded(None, "a cat")
    for name in ("none.txt", "../secret.txt", "nul\0.txt", f"{'long' * 100}.txt"):
        with pytest.raises(ValueError, match="There is no file") as error:
            encoded(Clip(), name)
        assert len(str(error.value)) < 300 + len(str(tmp_path))
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt .* is no text in UTF-8"):
        encoded(Clip(), "latin.txt")
    (tmp_path / "long.txt").write_text("a cat\n" * 200_000)
    with pytest.raises(ValueError, match="Take fewer prompts"):
        encoded(Clip(), "long.txt")


def test_batches_hold_whole_sets_of_a_conditionings_rows(pack: Any, flux: Family) -> None:
    """Three prompts in the rows of one conditioning, and batches of four: else the first would count twice."""
    tensor, more = flux.positive[0]
    rows = {key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in more.items() if torch.is_tensor(value)}
    several = [[tensor.repeat(3, 1, 1), more | rows]]
    few = SHORT | {"trajectories": 9, "held_out": 3}
    sizes = [train(pack, flux, **few, batch_size=size, positives=[several])[0].notes["training"] for size in (4, 2)]
    assert [training["batch_size"] for training in sizes] == [3, 2]


def test_as_many_trajectories_as_asked_for_and_the_budget_grows_with_them(pack: Any, flux: Family) -> None:
    job, shared = pack.nodes.training_job, {"model": flux.model, "latent_image": flux.latent, "negative": []}
    asked = pack.nodes.training_request.AskedPredictor
    subject = job.subject_of(asked.of(shared), [flux.positive])[1]

    def fit(**changes: Any) -> Any:
        return job.job_of(asked.of(shared | changes), subject).settings

    for effort in ("quick", "standard", "thorough"):
        usual = pack.amed_core.usual_settings(asked.of(shared).config(subject, 5), effort=effort)
        assert fit(effort=effort) == usual, "an untouched node but for its effort"
    usual = fit()
    assert fit(trajectories=1000).trajectories == 1000
    assert fit(trajectories=10 * usual.trajectories).budget == 10 * usual.budget
    assert fit(trajectories=3).batch_size == 3
    assert fit(batch_size=2).batch_size == 2


def test_steps_are_numbers_or_ranges_and_five_comes_first(pack: Any, flux: Family) -> None:
    asked = pack.nodes.training_request.AskedPredictor
    for steps, expected in (
        ("5", (5,)),
        (8, (8,)),
        ("3-6", (5, 3, 4, 6)),
        (" 4, 8-10 ", (4, 8, 9, 10)),
    ):
        assert asked.of({"steps": steps}).calls == expected
    for steps in ("", "five", "1", "6-3", "3-", "0-4", "101", "5.5", "-5"):
        with pytest.raises(ValueError, match=r"steps is .* names no .* as 3-10\. Set it in \"AMED Train Predictor\""):
            _ = asked.of({"steps": steps}).calls
    images = asked.of({"steps": "4-5", "starts": "noise and images", "model": flux.model}).uses
    levels = pack.nodes.training_request.image_levels(flux.model)
    assert [use.level for use in images[::2]] == [0.0, *levels]
    assert list(levels) == sorted(levels)


class Nested:
    """A latent of several shapes, as newer ComfyUI has them."""

    is_nested = True

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts

    def unbind(self) -> list[torch.Tensor]:
        return self.parts


def test_training_noise_has_the_latents_shapes(pack: Any) -> None:
    empty = pack.nodes.training_subject.empty
    nested = empty(Nested([torch.ones(1, 4, 3, 8, 8), torch.ones(1, 6, 50)]), 5)
    assert [part.shape for part in nested.unbind()] == [(5, 4, 3, 8, 8), (5, 6, 50)]
    assert empty(torch.ones(1, 4, 8, 8), 5).shape == (5, 4, 8, 8)


# Inputs without effect


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cfg_max": 2.0}, r"cfg_max 2.0 has no effect: it is not above cfg 3. Set it to 0, or above cfg, in"),
        ({"prompts": "a cat"}, "connect clip"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_words(
    pack: Any, flux: Family, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        train(pack, flux, **changes)
    assert '"AMED Train Predictor"' in str(error.value)


def test_a_guider_brings_its_own_cfg(pack: Any, flux: Family) -> None:
    import comfy.samplers  # noqa: PLC0415

    guider = comfy.samplers.CFGGuider(flux.model)
    guider.set_conds(flux.positive, flux.negative)
    guider.set_cfg(2.0)
    for cfg in (1.0, 2.0):  # an untouched input, and the same
        assert train(pack, flux, **SHORT, guider=guider, cfg=cfg)[0].config.guidance == 2.0
    with pytest.raises(ValueError, match=r"cfg 3.0 has no effect: A guider brings its own prompts and cfg, which is 2"):
        train(pack, flux, **SHORT, guider=guider, cfg=3.0)
    with pytest.raises(ValueError, match="2 prompts have no effect"):
        train(pack, flux, **SHORT, guider=guider, cfg=2.0, positives=[flux.positive, flux.positive])


@pytest.mark.parametrize("kind", ["AskedPredictor", "AskedPaper"])
def test_every_input_is_used_and_an_untouched_node_is_never_refused(pack: Any, kind: str) -> None:
    asked, node = getattr(pack.nodes.training_request, kind), pack.nodes.training
    schema = {"AskedPredictor": node.AMEDTrainPredictor, "AskedPaper": node.AMEDTrainPaperPredictor}[
        kind
    ].define_schema()
    assert schema.display_name == asked.NODE
    names = {one.id for one in schema.inputs}
    assert names == {field.name for field in dataclasses.fields(asked)} | {"positive"}
    untouched = asked.of({})
    untouched.refuse_without_effect(1)
    assert not any(untouched.given(name) for name in names - {"positive"})
    assert all(one.tooltip for one in [*schema.inputs, *schema.outputs])
    optional = [one.optional for one in schema.inputs]
    assert optional == sorted(optional), "as the browser orders them, so that saved values meet their inputs"


# What is shown


def test_report_plot_and_loss(pack: Any, flux: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths  # noqa: PLC0415

    made, losses, report, plot = train(pack, flux, **SHORT)
    assert f"{made.notes['training']['model_calls']:,} sample calls of training" in report
    assert re.search(r"4 calls (equal \d+ of|come nearer than 100 of) euler simple", report)
    assert report.count(" to ") >= 3, "one line per interval"
    assert made.notes["training"]["latents"] == [[16, 16, 16]]
    assert "fitted on latents of 16 x 16 x 16; at other sizes" in report
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3
    assert 0 <= float(plot.min()) < 0.2
    assert float(plot.max()) == 1
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    assert len(stock("LossGraphNode", loss=losses).ui["images"]) == 1


@pytest.mark.parametrize("how", [SHORT, {"paper": True}, {"paper": True, "predictor_type": "table", "trajectories": 4}])
def test_progress_counts_model_calls_and_shows_the_teacher_above_the_student(
    pack: Any, flux: Family, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    import comfy.utils  # noqa: PLC0415

    seen: list[tuple[int, int, Any]] = []
    told: list[str] = []

    def hook(done: int, total: int, preview: Any, **_: Any) -> None:
        seen.append((done, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(pack.nodes.training, "tell", lambda node, text: told.append(text))
    monkeypatch.setattr(pack.nodes.fitting, "TOLD_EVERY", 0.0)
    made = train(pack, flux, **(how | {"trajectories": 4, "held_out": 2}))[0]
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert all(d <= total for d, total, _ in seen)
    assert seen[-1][:2] == (made.notes["training"]["model_calls"],) * 2, "100 % in the end"
    pictures = [preview[1] for _, _, preview in seen if preview is not None]
    assert len(pictures) >= 2
    assert pictures[0].size[0] == 2 * pictures[0].size[1], "two samples side by side, of the slow sampler alone"
    assert pictures[-1].size[0] == pictures[-1].size[1], "the slow sampler's above the predictor's"
    first = next(done for done, _, preview in seen if preview is not None)
    assert first <= 0.1 * seen[-1][1], "the first in the first tenth"
    assert any("left" in text and "%" in text for text in told)
    assert "sample calls" in told[0], "before anything else"
    if how is SHORT:
        (price,) = re.findall(r"about ([\d,]+) sample calls", told[0])
        assert 0.5 * done[-1] < int(price.replace(",", "")) < 1.5 * done[-1], "what shows its worth included"
    priced = [text for text in told if "it pays after" in text]
    assert priced, "from the first calls on"
    assert "s here" in priced[0] or "min here" in priced[0]


@pytest.mark.parametrize("known", [False, True])
def test_newer_comfyui_is_told_that_it_trains(pack: Any, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    if known:
        monkeypatch.setattr(mm, "in_training", False, raising=False)
    else:
        monkeypatch.delattr(mm, "in_training", raising=False)
    with contextlib.suppress(KeyError), pack.nodes.gradients.marked_as_training():
        assert getattr(mm, "in_training", None) == (True if known else None)
        raise KeyError
    assert getattr(mm, "in_training", None) == (False if known else None)


def test_the_options_a_beginner_does_not_need_are_folded_away(pack: Any) -> None:
    for node, expected in (
        (pack.nodes.AMEDTrainPredictor, {"held_out", "batch_size", "teacher_calls", "teacher_steps", "trajectories"}),
        (pack.nodes.AMEDTrainPaperPredictor, {"rho", "gradient", "learning_rate", "held_out"}),
    ):
        asked = {one.id: one.as_dict() for one in node.define_schema().inputs}
        folded = {name for name, settings in asked.items() if settings.get("advanced")}
        assert expected <= folded
        assert not folded & {"model", "positive", "negative", "latent_image", "cfg", "steps", "sampler_name"}


# Sets, budgets and recipes


def test_one_training_makes_a_set_that_serves_every_number_of_steps_and_images(
    pack: Any, flux: Family, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is learned while sampling."""
    few = {"trajectories": 2, "held_out": 2, "teacher_calls": 8}
    made, _, report, _ = train(pack, flux, steps="3-4", starts="noise and images", effort="quick", **few)
    every = made.every
    assert every.calls == (3, 4)
    assert len(every.predictors) == 2 * (1 + len(pack.nodes.training_request.DENOISE))
    assert "steps 3, 4" in report
    assert "denoise below 1" in report
    applied = pack.nodes.AMEDApplyPredictor.execute(flux.model, made).args[0]
    for steps, denoise in ((3, 1.0), (4, 1.0), (4, 0.5), (3, 0.6)):
        asked: list[int] = []
        model = heard(applied, lambda _, asked=asked: asked.append(1))
        caplog.clear()
        k_sample(flux, model, steps, SCALE, "amed_multistep", denoise=denoise)
        assert len(asked) == steps
        assert "learn" not in caplog.text


def test_as_many_noises_are_compared_with_stock_however_many_prompts_there_are(pack: Any, flux: Family) -> None:
    """Each prompt has batches of its own, of one noise here."""
    rows: list[range] = []
    drawn = pack.nodes.fitting.noisy

    def noisy(wrap: Any, asked: range, *more: Any) -> torch.Tensor:
        rows.append(asked)
        made: torch.Tensor = drawn(wrap, asked, *more)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.fitting, "noisy", noisy)
        train(pack, flux, **(SHORT | {"trajectories": 3, "held_out": 6, "batch_size": 1, "steps": 3}))
    held_out = pack.amed_core.fit.trajectories.HELD_OUT
    compared = [row - held_out for asked in rows[-pack.nodes.fitting.COMPARED :] for row in asked]
    assert compared == list(range(pack.nodes.fitting.COMPARED))


def test_the_budget_hands_over_the_best_so_far(pack: Any, flux: Family, user: Path) -> None:
    made, _, report, _ = train(pack, flux, steps=3, effort="thorough", trajectories=8, held_out=4, budget=1e-4)
    assert "the budget stopped it" in report
    assert made.config.calls == 3
    assert not list(user.glob("*.safetensors"))


def test_what_cancel_leaves_can_be_used_at_once(pack: Any, flux: Family, models: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, calls = stopped_at(flux, 10**9)
    train(pack, flux, model, **SHORT)
    model, _ = stopped_at(flux, len(calls) - 60)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, **SHORT)
    (left,) = (models / "unfinished").glob("*.safetensors")
    assert pack.amed_core.load_predictor(left).config.calls == SHORT["steps"]
    train(pack, flux, model, **SHORT, save_as="auto")
    assert not left.exists(), "the finished one is saved"


def test_what_is_not_saved_is_kept_until_a_node_saves_it(pack: Any, flux: Family, user: Path, models: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, calls = stopped_at(flux, 10**9)
    made, _, report, _ = train(pack, flux, model, **SHORT, save_as="")
    (kept,) = models.rglob("*.safetensors")
    assert kept.parent == models / "unfinished"
    assert f'Not saved; "AMED Save Predictor" saves it. Until then it is unfinished/{kept.name}' in report
    assert not list(user.glob("*")), "which has pictures of prompts in it"
    assert torch.equal(pack.amed_core.load_predictor(kept).weights, made.predictor.weights)
    before = kept.read_bytes()
    model, _ = stopped_at(flux, len(calls) - 60)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, **SHORT, save_as="")
    assert [path.name for path in user.iterdir()] == [kept.name], "of the same training"
    assert kept.read_bytes() == before, "which does not cost what was finished"
    pack.nodes.AMEDSavePredictor.execute(made, "mine")
    assert [path.name for path in models.rglob("*.safetensors")] == ["mine_00001_.safetensors"]


def test_without_a_state_nothing_is_kept_of_what_is_not_saved(
    pack: Any, flux: Family, user: Path, models: Path
) -> None:
    report = train(pack, flux, **SHORT, save_as="", keep_state="never")[2]
    assert "Not saved" not in report
    assert not list(models.rglob("*.safetensors"))
    assert not list(user.glob("*"))


def test_what_is_not_saved_goes_by_the_rule_of_states(
    pack: Any, flux: Family, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack.nodes.states, "MOST_STATES", 2)
    for seed in range(3):
        train(pack, flux, **SHORT, save_as="", seed=seed)
    assert len(list((models / "unfinished").iterdir())) == 2


def test_a_recipe_is_reproduced_rather_than_the_models_own_solution(pack: Any, flux: Family) -> None:
    """A coarse one, whose pictures are not what many steps give."""
    how = {"steps": 3, "trajectories": 4, "held_out": 2, "cfg": 1.0, "teacher_calls": 0}
    coarse = {"teacher": "my recipe", "teacher_sampler": "euler", "teacher_scheduler": "simple", "teacher_steps": 4}
    recipe, plain = (train(pack, flux, **how, **more)[0] for more in (coarse, {}))
    assert recipe.notes["training"]["teacher"] == "euler simple, 4 steps"
    goal = k_sample(flux, flux.model, 4, 1.0, "euler", "simple")
    errors = []
    for made in (recipe, plain):
        applied = pack.nodes.AMEDApplyPredictor.execute(flux.model, made).args[0]
        drawn = k_sample(flux, applied, 3, 1.0, "amed_multistep")
        errors.append(float((drawn - goal).square().mean().sqrt()))
    assert errors[0] < 0.8 * errors[1]


REFUSED = [("euler_ancestral", "adds noise"), ("dpmpp_2m_sde", "adds noise"), ("euler_cfg_pp", "asks for more")]


@pytest.mark.parametrize(("sampler", "why"), REFUSED)
def test_a_recipe_that_no_student_can_follow_is_refused(pack: Any, flux: Family, sampler: str, why: str) -> None:
    how = SHORT | {"teacher_calls": 0, "teacher": "my recipe", "teacher_sampler": sampler}
    with pytest.raises(ValueError, match=rf"{sampler} .*{why}.*AMED Train Predictor"):
        train(pack, flux, **how)


def test_a_recipe_without_effect_is_refused(pack: Any, flux: Family) -> None:
    with pytest.raises(ValueError, match=r"teacher_steps 9 has no effect: teacher is \"converged\""):
        train(pack, flux, **SHORT, teacher_steps=9)
    with pytest.raises(ValueError, match=r"teacher_calls 8 has no effect"):
        train(pack, flux, **SHORT, teacher="my recipe")


def test_two_files_are_merged_into_one_that_is_saved_and_loaded(pack: Any, flux: Family, models: Path) -> None:
    three, four = (train(pack, flux, **(SHORT | {"steps": steps}))[0] for steps in (3, 4))
    (both,) = pack.nodes.AMEDMergePredictors.execute(three, four).args
    (name,) = pack.nodes.AMEDSavePredictor.execute(both, "both").args
    assert (models / name).is_file()
    loaded, _ = pack.nodes.AMEDLoadPredictor.execute(name).args
    assert loaded.every.calls == (3, 4)
    applied = pack.nodes.AMEDApplyPredictor.execute(flux.model, loaded).args[0]
    for steps, made in ((3, three), (4, four)):
        alone = pack.nodes.AMEDApplyPredictor.execute(flux.model, made).args[0]
        ours, theirs = (k_sample(flux, model, steps, SCALE, "amed_multistep") for model in (applied, alone))
        assert torch.equal(ours, theirs)


def test_what_does_not_go_together_is_not_merged(pack: Any, flux: Family) -> None:
    made = train(pack, flux, **SHORT)[0]
    config = dataclasses.replace(made.config, model={**made.config.model, "family": "Other"})
    other = pack.nodes.values.NotedPredictor(pack.amed_core.build(config))
    with pytest.raises(ValueError, match=r"of two models \(family Flux and Other\)\. .*AMED Merge Predictors"):
        pack.nodes.AMEDMergePredictors.execute(made, other)
    papers = train(pack, flux, paper=True, predictor_type="table", steps=3)[0]
    with pytest.raises(ValueError, match=r"Only multistep .*AMED Merge Predictors"):
        pack.nodes.AMEDMergePredictors.execute(made, papers)
