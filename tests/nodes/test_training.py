"""Training in the node: derivatives in every family, what is left behind, prompts, guidance, and what is shown."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FUSED, SPECS, Family, make, prompt
from stock import stock
from torch import Tensor
from toys import apply, guided, inside, k_sample, train

SCALE = 3.0


@pytest.fixture
def flux(pack: Any) -> Family:
    return make("flux")


@pytest.fixture
def user(pack: Any, tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's user folder, where unfinished fits are kept."""
    import folder_paths  # noqa: PLC0415

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path / "amed_training"
    folder_paths.set_user_directory(before)


# Derivatives


def gradient_of(pack: Any, family: Family, gradient: str) -> tuple[Tensor, str]:
    """Of one interval's loss by the predictor's weights, through the guided model; and the method that was used."""
    core, nodes = pack.amed_core, pack.nodes
    model = nodes.timesteps.with_interpolated_timesteps(family.model)
    clone = nodes.gradients.without_inference_tensors

    def work(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any) -> tuple[Tensor, str]:
        del sigmas
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            stack.enter_context(nodes.gradients.marked_as_training())  # some fused kernels have no derivative
            if gradient == "reverse":
                stack.enter_context(nodes.gradients.differentiable(wrapped.inner_model))
            config = nodes.training.student_config(model, "amed", 3, features="latent", scale_time=0.2)
            network = core.AMEDPredictor(config, torch.Generator().manual_seed(1)).to(x.device)
            denoiser = nodes.bridge.ComfyDenoiser(wrapped, extra_args, config.sigmas, bottleneck=False)
            start = x.clone() * config.sigmas[0]
            settings = core.TrainConfig(
                trajectories=len(x), batch_size=len(x), gradient=gradient, step=3e-4, teacher="euler", teacher_points=1
            )
            fitted = core.Trainer(network, lambda rows: (start, denoiser), settings)
            loss = fitted.loss(fitted.begin())[0]
            loss.backward(inputs=list(network.parameters()))
            return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]), fitted.gradient

    guider = guided(family, model, SCALE, clone(family.positive), clone(family.negative))
    return inside(guider, family, work)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in FUSED])
def test_all_three_ways_give_the_same_gradient(pack: Any, name: str) -> None:
    """Forward and reverse mode to rounding; finite differences of toys with random weights, which are rough, to 3 %."""
    family = make(name, batch=1)
    rough = 0.1 if name == "hunyuan3d" else 0.03  # whose embedding of the noise level has ten times the frequencies
    reverse, _ = gradient_of(pack, family, "reverse")
    forward, used = gradient_of(pack, family, "forward")
    differences, _ = gradient_of(pack, family, "finite difference")
    assert used == "forward", "it passed its check"
    assert float((forward - reverse).norm() / reverse.norm()) < 1e-3
    assert float((differences - reverse).norm() / reverse.norm()) < rough


@pytest.mark.parametrize("name", FUSED)
def test_where_a_model_has_no_derivative_forward_mode_gives_way_to_finite_differences(pack: Any, name: str) -> None:
    """Or it has one after all, in an older ComfyUI."""
    family = make(name, batch=1)
    forward, _ = gradient_of(pack, family, "forward")
    differences, _ = gradient_of(pack, family, "finite difference")
    assert float((forward - differences).norm() / differences.norm()) < 0.03


# What is left behind


def everything_of(model: Any) -> Any:
    """All of a MODEL that training could leave changed."""
    modules = list(model.model.modules())
    slots = [(name, t) for m in modules for name, t in (m._parameters | m._buffers).items() if t is not None]
    tensors = [(name, id(t), t.requires_grad) for name, t in slots]
    state = model.model.state_dict().items()
    weights = {name: bytes(value.cpu().contiguous().view(torch.uint8).numpy()) for name, value in state}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
    return weights, tensors, hooks, str(model.model_options), dict(model.object_patches), dict(model.attachments)


@pytest.mark.parametrize("gradient", ["finite difference", "forward", "reverse"])
@pytest.mark.parametrize("predictor_type", ["network", "table"])
def test_the_model_is_byte_for_byte_as_it_was(pack: Any, flux: Family, gradient: str, predictor_type: str) -> None:
    """It was loaded in inference mode, as ComfyUI's loaders do."""
    with torch.inference_mode():
        for module in flux.model.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    assert next(flux.model.model.parameters()).is_inference()
    k_sample(flux, flux.model, 1, SCALE, "euler", "simple")  # ComfyUI's own first load leaves its marks
    before = everything_of(flux.model)
    train(pack, flux, gradient=gradient, predictor_type=predictor_type)
    assert everything_of(flux.model) == before


def cancelling(family: Family, call: int) -> Any:
    """The MODEL, but the user presses Cancel during its `call`-th call."""
    import comfy.model_management as mm  # noqa: PLC0415

    made, model = [], family.model.clone()

    def wrapper(apply_model: Any, parameters: Any) -> Tensor:
        made.append(1)
        if len(made) == call:
            mm.interrupt_current_processing()
        answer: Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    model.set_model_unet_function_wrapper(wrapper)
    return model, made


@pytest.mark.parametrize(
    ("how", "call"),
    [
        ({"predictor_type": "table", "trajectories": 4, "held_out": 4}, 25),
        ({"predictor_type": "table", "trajectories": 4, "held_out": 4}, 90),
        ({"trajectories": 8}, 40),
        ({"trajectories": 8, "epochs": 3}, 60),
        ({"objective": "end to end", "trajectories": 4}, 180),
    ],
)
def test_cancelled_within_one_call_it_goes_on_where_it_was(
    pack: Any, flux: Family, user: Path, how: dict[str, Any], call: int
) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    whole, losses, *_ = train(pack, flux, **how)
    assert not list(user.glob("*")), "a finished fit leaves nothing"
    model, made = cancelling(flux, call)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, **how)
    assert len(made) == call
    assert len(list(user.glob("*.safetensors"))) == 1
    resumed, again, report, _ = train(pack, flux, model, **how)
    assert "before it was stopped" in report
    assert len(made) - call < len(made), "not all of it was done again"
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert again["loss"] == losses["loss"]
    assert not list(user.glob("*"))


def test_a_damaged_state_is_not_used(pack: Any, flux: Family, user: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = cancelling(flux, 20)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model)
    (state,) = user.glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    assert "before it was stopped" not in train(pack, flux, model)[2]


def test_other_settings_do_not_go_on_from_a_state(pack: Any, flux: Family, user: Path) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = cancelling(flux, 20)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model)
    assert "before it was stopped" not in train(pack, flux, model, learning_rate=0.001)[2]
    assert "before it was stopped" not in train(pack, flux, model, positives=[prompt("flux", 9)])[2]
    assert len(list(user.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("predictor_type", ["network", "table"])
def test_running_out_of_memory_halves_the_batch_and_goes_on(pack: Any, flux: Family, predictor_type: str) -> None:
    """A device with room for 4 rows, which is 2 samples with guidance."""
    made, model = [], flux.model.clone()

    def wrapper(apply_model: Any, parameters: Any) -> Tensor:
        made.append(len(parameters["input"]))
        if made[-1] > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        answer: Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    model.set_model_unet_function_wrapper(wrapper)
    how = {"predictor_type": predictor_type, "trajectories": 4, "batch_size": 4, "held_out": 2}
    small, large = (train(pack, flux, m, **how)[0] for m in (model, None))
    first = made.index(8)
    assert made[first : first + 3] == [8, 4, 4]
    assert max(made[first + 1 :]) == 4
    ours, theirs = small.network.state_dict(), large.network.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-2)


# Prompts and guidance


def asked_for(family: Family) -> tuple[Any, list[float]]:
    """The MODEL, and a mark of every prompt row it is asked about."""
    marks: list[float] = []
    model = family.model.clone()

    def wrapper(apply_model: Any, parameters: Any) -> Tensor:
        marks.extend(round(float(row.sum()), 3) for row in parameters["c"]["c_crossattn"].cpu())
        answer: Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    model.set_model_unet_function_wrapper(wrapper)
    return model, marks


def test_a_list_of_prompts_is_trained_on_and_every_fourth_judges(pack: Any, flux: Family) -> None:
    prompts = [prompt("flux", seed) for seed in range(20, 25)]
    model, marks = asked_for(flux)
    made, _, report, _ = train(
        pack, flux, model, positives=prompts, predictor_type="table", trajectories=4, held_out=2, cfg=1.0
    )
    mark = [round(float(p[0][0][0].sum()), 3) for p in prompts]
    assert set(marks) == set(mark), "at cfg 1 every call is for one of the prompts"
    assert made.notes["training"]["prompts"] == 5
    assert made.notes["training"]["trajectories"] >= 4
    assert pack.nodes.training.split(5) == ((0, 1, 2, 4), (3,))
    assert pack.nodes.training.split(2) == ((0, 1), (0, 1))
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
    for name in ("none.txt", "../secret.txt"):
        with pytest.raises(ValueError, match="There is no file"):
            encoded(Clip(), name)


def test_a_range_of_cfg_is_interpolated_and_left_only_with_a_warning(
    pack: Any, flux: Family, caplog: pytest.LogCaptureFixture
) -> None:
    made = train(pack, flux, predictor_type="table", cfg=2.0, cfg_max=6.0, trajectories=2)[0]
    assert made.network.config.guidances == (2.0, 4.0, 6.0)
    assert not torch.allclose(made.network.plans[0], made.network.plans[2])
    applied = apply(pack, flux, made)
    pictures = {}
    for scale, warned in ((2.0, False), (3.0, False), (6.0, False), (7.0, True), (1.5, True)):
        caplog.clear()
        pictures[scale] = k_sample(flux, applied, 5, scale)
        assert ("guidance was cfg 2 to 6" in caplog.text) == warned
    alone = pack.nodes.values.Predictor(made.network)
    assert pictures[3.0].isfinite().all()
    assert pack.nodes.values.describe(alone).endswith("cfg 2 to 6")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cfg_max": 5.0}, "cfg_max to 0"),
        ({"predictor_type": "table", "objective": "per interval"}, "A table is fitted end to end"),
        ({"prompts": "a cat"}, "connect clip"),
        ({"scheduler": "searched", "preset": "paper"}, "paper's grids end at sigma_min"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_words(
    pack: Any, flux: Family, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(pack, flux, **changes)


@pytest.mark.parametrize("student", ["amed", "amed_ipndm"])
def test_the_grid_of_every_student_can_be_searched(pack: Any, flux: Family, student: str) -> None:
    how = {"sampler_name": student, "predictor_type": "table", "trajectories": 4, "cfg": 1.0}
    usual = train(pack, flux, **how)[0]
    made = train(pack, flux, **how, scheduler="searched")[0]
    assert made.network.config.schedule == "searched"
    assert made.network.config.sigmas != usual.network.config.sigmas
    assert made.network.config.calls == 5
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    applied = apply(pack, flux, made)
    assert k_sample(flux, applied, 5, 1.0, student).isfinite().all()
    assert k_sample(flux, flux.model, 5, 1.0, "ipndm", "simple", sigmas=sigmas).isfinite().all(), "SIGMAS for anyone"


# What is shown


def test_report_plot_and_loss(pack: Any, flux: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths  # noqa: PLC0415

    made, losses, report, plot = train(pack, flux, predictor_type="table")
    assert f"{made.notes['training']['model_calls']:,} model calls of training" in report
    assert report.count(" to ") >= 3, "one line per interval"
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3
    assert 0 <= float(plot.min()) < 0.2
    assert float(plot.max()) == 1
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    assert len(stock("LossGraphNode", loss=losses).ui["images"]) == 1


def test_progress_counts_model_calls_and_shows_the_teacher_above_the_student(
    pack: Any, flux: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils  # noqa: PLC0415

    seen: list[tuple[int, int, Any]] = []
    told: list[str] = []

    def hook(done: int, total: int, preview: Any, **_: Any) -> None:
        seen.append((done, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(pack.nodes.training, "tell", lambda node, text: told.append(text))
    monkeypatch.setattr(pack.nodes.fitting, "TOLD_EVERY", 0.0)
    train(pack, flux, predictor_type="table", trajectories=4)
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert all(d <= total for d, total, _ in seen)
    pictures = [preview[1] for _, _, preview in seen if preview is not None]
    assert len(pictures) >= 2
    assert pictures[0].size[0] == pictures[0].size[1], "two samples side by side, the teacher's above the student's"
    assert any("left" in text and "%" in text for text in told)


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
    asked = {one.id: one.as_dict() for one in pack.nodes.AMEDTrainPredictor.define_schema().inputs}
    folded = {name for name, settings in asked.items() if settings.get("advanced")}
    assert {"rho", "gradient", "objective", "held_out"} <= folded
    assert not folded & {"model", "positive", "negative", "latent_image", "cfg", "steps", "sampler_name"}
    assert all(settings["tooltip"] for settings in asked.values())
