"""AMED as ComfyUI sampler functions: `fn(model, x, sigmas, extra_args, callback, disable)`."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.calls import Run, call_sigmas, read
from ..amed_core.driver import Answer, answers_of, raise_if_not_finite, trajectory
from ..amed_core.types import Sample, Sigma
from .bridge import ComfyDenoiser, refuse_other_model
from .values import ATTACHMENT, SAMPLERS, Predictor, sampler_name

SCHEDULER = "amed"


@torch.no_grad()
def sample_amed(
    model: Any,
    x: Sample,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    name: str | None = None,
    predictor: Predictor | None = None,
) -> Sample:
    """Sample with `predictor`, or with the one applied to the model; `name` is the chosen entry of the sampler list."""
    if len(sigmas) < 2:
        return x
    guider = model.inner_model
    patcher = guider.model_patcher
    predictor = predictor or patcher.get_attachment(ATTACHMENT)
    if predictor is None:
        raise ValueError(
            f'The sampler "{name}" needs a predictor, but the MODEL has none. Add the node "AMED Apply Predictor" '
            "between your model and the sampler, or choose another sampler."
        )
    config = predictor.network.config
    made_for = sampler_name(predictor.network)
    if name is not None and name != made_for:
        raise ValueError(
            f'The applied predictor was made for the sampler "{made_for}", but "{name}" is chosen. '
            f'Choose "{made_for}" as sampler_name, or apply another predictor in "AMED Apply Predictor".'
        )
    refuse_other_model(dict(config.model), patcher)
    run = read(sigmas.tolist(), config)
    _warn(run, predictor, guider)

    network = predictor.network.to(x.device)
    planner = network.planner(run.plain)
    grid = torch.tensor(run.sigmas, dtype=torch.float64)
    call = count()
    with tqdm(total=run.calls, disable=disable) as bar:

        def report(x: Sample, sigma: Sigma, denoised: Sample) -> None:
            if callback is not None:
                callback({"x": x, "i": next(call), "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            bar.update()

        denoiser = ComfyDenoiser(model, guider, extra_args or {}, report, features=config.features == "bottleneck")
        solver = config.build_solver()
        answers: list[Answer] = []
        for step in trajectory(denoiser, x, grid, solver, planner, analytic_first_step=run.analytic_first_step):
            answers += answers_of(step)
            x = step.x
    raise_if_not_finite(answers)
    return x


def _warn(run: Run, predictor: Predictor, guider: Any) -> None:
    config = predictor.network.config
    if not run.own_grid:
        logging.warning(
            "AMED: these noise levels are not the ones the predictor was made for; it plans them by interpolation. "
            'For its best quality use the scheduler "amed" with denoise 1 and steps %d.',
            config.calls,
        )
    cfg = getattr(guider, "cfg", None)
    if cfg is not None and abs(cfg - config.guidance) > 1e-3:
        logging.warning(
            "AMED: the predictor was made at cfg %g and is used at cfg %g; train one at the cfg you use.",
            config.guidance,
            cfg,
        )


def sampler_functions() -> dict[str, Callable[..., Sample]]:
    """One function per entry of the sampler list."""
    return {name: partial(sample_amed, name=name) for name in SAMPLERS}


def scheduler(model_sampling: Any, steps: int) -> Tensor:
    """The scheduler list's entry: the applied predictor's noise levels, one per model call."""
    predictor = getattr(model_sampling, ATTACHMENT, None)
    if predictor is None:
        raise ValueError(
            f'The scheduler "{SCHEDULER}" gives the grid of an applied predictor, but the MODEL has none. Add the '
            'node "AMED Apply Predictor" last before the sampler (after any model sampling or shift node), or choose '
            "another scheduler."
        )
    return torch.tensor(call_sigmas(predictor.network.config, steps), dtype=torch.float32)
