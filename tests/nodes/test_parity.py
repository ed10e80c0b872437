"""With a fixed planner our loop takes the steps of ComfyUI's own samplers, in every family, on the same sigmas."""

from typing import Any

import pytest
import torch
from families import SPECS, make
from toys import guided, inside

from amed_core import Dpm2, DpmSolverPP, FixedMidpoint, Ipndm, Method, NoMidpoint, sample
from amed_core.types import Planner, Solver

STEPS = 4


def stock(name: str, model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> torch.Tensor:
    """ComfyUI's own function."""
    import comfy.k_diffusion.sampling  # noqa: PLC0415

    function = getattr(comfy.k_diffusion.sampling, f"sample_{name}")
    drawn: torch.Tensor = function(model, x.clone(), sigmas, extra_args=extra_args, disable=True)
    return drawn


def both(pack: Any, name: str, family_name: str, solver: Solver, planner: Planner) -> tuple[torch.Tensor, torch.Tensor]:
    """What ComfyUI's sampler and our loop draw from the same noise."""
    import comfy.samplers  # noqa: PLC0415

    family = make(family_name)
    sampling = family.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)

    def draw(model: Any, noise: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> Any:
        x = noise * sigmas[0]
        denoiser = pack.nodes.bridge.ComfyDenoiser(model, extra_args, sigmas.tolist(), bottleneck=False)
        return stock(name, model, x, sigmas, extra_args), sample(
            denoiser, x, Method(tuple(sigmas.tolist()), solver, planner)
        )

    theirs, ours = inside(guided(family), family, draw, tuple(sigmas.tolist()))
    return theirs, ours


def assert_equal_to_rounding(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize(
    ("name", "solver", "planner"),
    [
        ("euler", Ipndm(1), NoMidpoint()),
        ("heun", Dpm2(), FixedMidpoint(1.0, plain=frozenset({STEPS - 1}))),
        ("dpm_2", Dpm2(), FixedMidpoint(0.5, plain=frozenset({STEPS - 1}))),
        ("ipndm", Ipndm(4), NoMidpoint()),
    ],
)
def test_our_steps_are_comfyuis(pack: Any, name: str, solver: Solver, planner: Planner, family: str) -> None:
    assert_equal_to_rounding(*both(pack, name, family, solver, planner))


@pytest.mark.parametrize("family", SPECS)
def test_dpmpp_2m_takes_comfyuis_steps_in_the_half_log_snr_of_eps_models(pack: Any, family: str) -> None:
    """Also on flow models, where ComfyUI's sampler uses -ln(sigma), too."""
    solver = DpmSolverPP(2, lower_order_final=False)
    assert_equal_to_rounding(*both(pack, "dpmpp_2m", family, solver, NoMidpoint()))


@pytest.mark.parametrize("family", [name for name, spec in SPECS.items() if spec.flow])
def test_for_flow_models_ours_steps_in_their_own_half_log_snr_and_so_differs(pack: Any, family: str) -> None:
    """ln((1 - sigma) / sigma), which in ComfyUI only the SDE version of this sampler uses."""
    theirs, ours = both(pack, "dpmpp_2m", family, DpmSolverPP(2, lower_order_final=False, flow=True), NoMidpoint())
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference > 1e-3
    # Of order 1 the two are the same step, whatever lambda is.
    assert_equal_to_rounding(*both(pack, "euler", family, DpmSolverPP(1, flow=True), NoMidpoint()))


@pytest.mark.parametrize("family", [name for name, spec in SPECS.items() if spec.flow])
def test_that_half_log_snr_is_comfyuis_own(pack: Any, family: str) -> None:
    from comfy.k_diffusion.sampling import sigma_to_half_log_snr  # noqa: PLC0415

    sampling = make(family).model.get_model_object("model_sampling")
    sigma = torch.tensor([0.999, 0.7, 0.3, 0.01], dtype=torch.float64)
    torch.testing.assert_close(DpmSolverPP(flow=True)._half_log_snr(sigma), sigma_to_half_log_snr(sigma, sampling))


def test_the_final_order_drop_of_the_published_dpmpp_is_not_comfyuis(pack: Any) -> None:
    """ComfyUI drops the order only where sigma is 0; the published solver, and our students, also before any end."""
    import comfy.samplers  # noqa: PLC0415

    family = make("sd15")
    sigmas = comfy.samplers.calculate_sigmas(family.model.get_model_object("model_sampling"), "karras", STEPS)[:-1]

    def draw(model: Any, noise: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> Any:
        x = noise * sigmas[0]
        denoiser = pack.nodes.bridge.ComfyDenoiser(model, extra_args, sigmas.tolist(), bottleneck=False)
        theirs = stock("dpmpp_2m", model, x, sigmas, extra_args)
        grid = tuple(sigmas.tolist())
        methods = [Method(grid, DpmSolverPP(2, lower_order_final=drop), NoMidpoint()) for drop in (False, True)]
        return theirs, *(sample(denoiser, x, method) for method in methods)

    theirs, without, with_drop = inside(guided(family), family, draw, tuple(sigmas.tolist()))
    assert_equal_to_rounding(theirs, without)
    assert not torch.allclose(theirs, with_drop, rtol=1e-2)
