"""AMED Train Paper Predictor: derivatives in every family, networks and tables, grids, and inputs without effect."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FUSED, SPECS, Family, make
from torch import Tensor
from toys import (
    apply,
    everything_of,
    goes_on,
    guided,
    in_inference_mode,
    inside,
    k_sample,
    survives_little_memory,
    train,
)

SCALE = 3.0
TABLE = {"predictor_type": "table", "trajectories": 4, "held_out": 4}


@pytest.fixture
def flux(pack: Any) -> Family:
    del pack
    return make("flux")


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
            facts = nodes.pairing.model_facts(model)
            config = core.student_config("amed", 3, facts, features="latent", scale_time=0.2)
            denoiser = nodes.bridge.ComfyDenoiser(wrapped, extra_args, config.sigmas, bottleneck=False)
            start = x.clone() * config.sigmas[0]
            settings = core.TrainConfig(
                trajectories=len(x), batch_size=len(x), gradient=gradient, step=3e-4, teacher="euler", teacher_points=1
            )
            fit = core.make_fit(config, settings, lambda rows: (start, denoiser), seed=1, device=x.device)
            loss = fit.loss(fit.begin())[0]
            weights = list(fit.predictor.parameters())
            loss.backward(inputs=weights)
            return torch.cat([p.grad.flatten() for p in weights if p.grad is not None]), fit.gradient

    guider = guided(family, model, SCALE, clone(family.positive), clone(family.negative))
    return inside(guider, family, work)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in FUSED])
def test_both_ways_give_the_same_gradient(pack: Any, name: str) -> None:
    """Finite differences of toys with random weights, which are rough, to 3 %."""
    family = make(name, batch=1)
    rough = 0.1 if name == "hunyuan3d" else 0.03  # whose embedding of the noise level has ten times the frequencies
    reverse, used = gradient_of(pack, family, "reverse")
    differences, _ = gradient_of(pack, family, "finite difference")
    assert used == "reverse", "it passed its check"
    assert float((differences - reverse).norm() / reverse.norm()) < rough


@pytest.mark.parametrize("name", FUSED)
def test_where_a_model_has_no_derivative_autograd_gives_way_to_finite_differences(pack: Any, name: str) -> None:
    """Or it has one after all, in an older ComfyUI."""
    family = make(name, batch=1)
    reverse, _ = gradient_of(pack, family, "reverse")
    differences, _ = gradient_of(pack, family, "finite difference")
    assert float((reverse - differences).norm() / differences.norm()) < 0.03


@pytest.mark.parametrize("size", [64, 1000, 20_000])
def test_a_tensor_that_takes_the_place_of_one_that_was_changed_is_not_taken_for_it(pack: Any, size: int) -> None:
    """Blocks change activations in place, and memory is used again."""
    x, outs, between = torch.ones(size, requires_grad=True), [], []
    with pack.nodes.gradients.differentiable(torch.nn.Identity()):
        for n in range(60):
            block = x + float(n)
            outs.append((block * block).sum())
            if n % 3:
                block.zero_()
            else:
                block.mul_(2.0)
            between.append(torch.empty(size))
            if n % 7 == 0:
                between.clear()
            del block
        torch.stack(outs).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((size,), sum(2.0 * (1 + n) for n in range(60))))


def test_autograd_that_disagrees_gives_way_and_the_file_says_so(pack: Any, flux: Family) -> None:
    """A patch that detaches what it is given answers a wrong derivative silently."""
    model = flux.model.clone()

    def detaching(apply_model: Any, parameters: Any) -> Tensor:
        x = parameters["input"]
        answer: Tensor = apply_model(x.detach(), parameters["timestep"].detach(), **parameters["c"]) + x - x.detach()
        return answer

    model.set_model_unet_function_wrapper(detaching)
    made, other = (train(pack, flux, model, paper=True, gradient=g)[0] for g in ("reverse", "finite difference"))
    assert made.notes["training"]["gradient"] == "finite difference"
    assert train(pack, flux, paper=True, gradient="reverse")[0].notes["training"]["gradient"] == "reverse"
    theirs = other.predictor.state_dict()
    for name, weight in made.predictor.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-3)


# What is left behind


@pytest.mark.parametrize("how", [{}, {"gradient": "reverse"}, TABLE], ids=["network", "reverse", "table"])
def test_the_model_is_byte_for_byte_as_it_was(pack: Any, flux: Family, how: dict[str, Any]) -> None:
    assert next(in_inference_mode(flux).model.model.parameters()).is_inference()
    k_sample(flux, flux.model, 1, SCALE, "euler", "simple")  # ComfyUI's own first load leaves its marks
    before = everything_of(flux.model)
    train(pack, flux, paper=True, **how)
    assert everything_of(flux.model) == before


@pytest.mark.parametrize(
    ("how", "call"),
    [(TABLE, 25), (TABLE, 90), ({"trajectories": 8}, 40), ({"trajectories": 8, "epochs": 3}, 60)],
)
@pytest.mark.trust("resumed")
def test_cancelled_within_one_call_it_goes_on_where_it_was(
    pack: Any, flux: Family, user: Path, how: dict[str, Any], call: int
) -> None:
    goes_on(pack, flux, user, call, paper=True, **how)


@pytest.mark.parametrize("predictor_type", ["network", "table"])
@pytest.mark.trust("training")
def test_running_out_of_memory_halves_the_batch_and_goes_on(pack: Any, flux: Family, predictor_type: str) -> None:
    survives_little_memory(pack, flux, paper=True, predictor_type=predictor_type)


# What is made


def test_the_paper_is_one_choice_away(pack: Any, flux: Family) -> None:
    made = train(pack, flux, paper=True, preset="paper")[0]
    assert (made.config.kind, made.config.solver) == ("network", "amed")
    assert made.config.analytic_first_step, "as published for 5 calls"
    assert not made.config.plain_last
    assert k_sample(flux, apply(pack, flux, made), 5, SCALE).isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("features", ["bottleneck", "latent", "none"])
def test_features_can_be_chosen(pack: Any, name: str, features: str) -> None:
    family = make(name)
    if features == "bottleneck" and name == "flux":
        with pytest.raises(ValueError, match=r'\(Flux\) has no U-Net bottleneck.*"auto" or "latent"'):
            train(pack, family, paper=True, features=features)
        return
    made = train(pack, family, paper=True, features=features)[0]
    assert made.config.features == features
    assert k_sample(family, apply(pack, family, made), 5, SCALE).isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "stable_audio", "cogvideox", "ltxav"])
@pytest.mark.parametrize("student", ["amed", "amed_dpmpp_2m"])
def test_a_table_is_fitted_and_samples(pack: Any, name: str, student: str) -> None:
    """Its largest seed, too: ComfyUI's go up to 64 bits."""
    family = make(name)
    made, _, report, _ = train(
        pack, family, paper=True, predictor_type="table", sampler_name=student, seed=0xFFFFFFFFFFFFFFFF
    )
    assert made.config.kind == "table"
    training = made.notes["training"]
    beaten = training["error"] < training["baseline_error"]
    assert ("less than that of" if beaten else "NOT better than") in report
    assert k_sample(family, apply(pack, family, made), 5, SCALE, student).isfinite().all()


def test_a_range_of_cfg_is_interpolated_and_left_only_with_a_warning(
    pack: Any, flux: Family, caplog: pytest.LogCaptureFixture
) -> None:
    made = train(pack, flux, paper=True, predictor_type="table", cfg=2.0, cfg_max=6.0, trajectories=2)[0]
    assert made.config.guidances == (2.0, 4.0, 6.0)
    assert not torch.allclose(made.predictor.plans[0], made.predictor.plans[2])
    applied = apply(pack, flux, made)
    pictures = {}
    for scale, warned in ((2.0, False), (3.0, False), (6.0, False), (7.0, True), (1.5, True)):
        caplog.clear()
        pictures[scale] = k_sample(flux, applied, 5, scale)
        assert ("guidance was cfg 2 to 6" in caplog.text) == warned
    assert pictures[3.0].isfinite().all()
    assert pack.nodes.values.describe(made).endswith("cfg 2 to 6")


@pytest.mark.parametrize("student", ["amed", "amed_ipndm"])
def test_the_grid_of_every_student_can_be_searched(pack: Any, flux: Family, student: str) -> None:
    how = {"paper": True, "sampler_name": student, "predictor_type": "table", "trajectories": 4, "cfg": 1.0}
    usual = train(pack, flux, **how)[0]
    made = train(pack, flux, **how, scheduler="searched")[0]
    assert made.config.schedule == "searched"
    assert made.config.sigmas != usual.config.sigmas
    assert made.config.calls == 5
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    applied = apply(pack, flux, made)
    assert k_sample(flux, applied, 5, 1.0, student).isfinite().all()
    assert k_sample(flux, flux.model, 5, 1.0, "ipndm", "simple", sigmas=sigmas).isfinite().all(), "SIGMAS for anyone"


# Inputs without effect


OF_NETWORKS = {
    "features": "latent",
    "teacher": "euler",
    "teacher_points": 2,
    "learning_rate": 0.001,
    "epochs": 2,
    "gradient": "reverse",
}


@pytest.mark.parametrize(
    ("name", "value", "beside", "why"),
    [
        ("cfg_max", 5.0, {}, "predictor_type is 'network', and only a table uses it"),
        *((name, value, TABLE, "predictor_type is 'table', and only a network") for name, value in OF_NETWORKS.items()),
        ("cfg_max", 3.0, TABLE, "it is not above cfg 3"),
        ("scheduler", "searched", {"preset": "paper"}, "the paper's grids end at sigma_min, searched ones at 0"),
        ("rho", 3.0, {"scheduler": "logsnr"}, "the schedule 'logsnr' has none"),
        ("rho", 3.0, {"scheduler": "searched"}, "the schedule 'searched' has none"),
    ],
)
def test_an_input_without_effect_is_refused_by_name(
    pack: Any, flux: Family, name: str, value: Any, beside: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} {value!r} has no effect: {why}") as error:
        train(pack, flux, paper=True, **beside, **{name: value})
    assert " Set " in str(error.value)
    assert str(error.value).endswith('in "AMED Train Paper Predictor".')


def test_each_type_of_predictor_takes_its_own_inputs(pack: Any, flux: Family) -> None:
    made = train(pack, flux, paper=True, **(OF_NETWORKS | {"gradient": "finite difference"}))[0]
    training = made.notes["training"]
    assert made.config.features == "latent"
    assert (training["teacher"], training["teacher_points"], training["epochs"]) == ("euler", 2, 2)
    assert training["learning_rate"] == 0.001
    assert training["seed"] == 0
