"""AMED as ComfyUI sampler functions: `fn(model, x, sigmas, extra_args, callback, disable)`."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core import PredictorConfig
from ..amed_core.calls import Run, call_sigmas, read
from ..amed_core.driver import NoMidpoint, Total, answers_of, raise_if_not_finite, trajectory
from ..amed_core.types import Sample, Sigma
from .bridge import ComfyDenoiser, guider_of, look, shows_guidance
from .pairing import differences, fingerprint, refuse_other_model, scale
from .values import ATTACHMENT, SAMPLERS, Predictor, sampler_name, warn

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
    guider = guider_of(model)
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
    found = fingerprint(patcher)
    refuse_other_model(config, found)
    levels = sigmas.tolist()
    run = read(levels, config)
    warn(_sentences(run, config, found, guider))

    network = predictor.network
    if next(network.parameters()).device != x.device:  # the predictor belongs to other nodes as well: they keep theirs
        network = copy.deepcopy(network).to(x.device)
    blind = config.guided and run.own_grid and not shows_guidance(guider)
    solver = config.build_solver() if blind else network.solver(run.sigmas, scale(guider))
    planner = NoMidpoint() if blind else network.planner(run.sigmas, run.plain, look(config, model), scale(guider))
    grid = torch.tensor(run.sigmas, dtype=torch.float64)
    call, mask = count(), (extra_args or {}).get("denoise_mask")
    with tqdm(total=run.calls, disable=disable) as bar:

        def report(x: Sample, sigma: Sigma, denoised: Sample) -> None:
            if callback is not None:
                callback({"x": x, "i": next(call), "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            bar.update()

        sees = config.features == "bottleneck" and bool(run.planned)
        shown = {"bottleneck": sees, "guidance": config.guided and run.own_grid and not blind}
        denoiser = ComfyDenoiser(model, extra_args or {}, levels, **shown, per_call=True, on_call=report)
        first = config.first if run.analytic_first_step else None
        answers: list[Total] = []
        for step in trajectory(denoiser, x, grid, solver, planner, first=first):
            answers += answers_of(step)
            x = step.x
            if mask is not None and step.index == len(run.sigmas) - 2 and levels[-1] == 0:
                x = torch.where(mask > 0, x, step.start.denoised)  # what is not to change is exact in the last answer
            del step  # its evaluations need not live through the next model call
    raise_if_not_finite(answers)
    return x


def _sentences(run: Run, config: PredictorConfig, found: dict[str, Any], guider: Any) -> list[str]:
    """What the user should know of a run before looking at its picture."""
    sentences = differences(config, found, guider)
    if config.guided and run.own_grid and not shows_guidance(guider):
        sentences.append(
            "the predictor steps along what guidance adds, but this sampler's model has no two answers to show (cfg is "
            "1, or the guider has more than two prompts): all calls are plain ones. Use KSampler or CFGGuider with "
            f"cfg {config.guidance:g}, or another predictor."
        )
    if not run.own_grid:
        what = f"plans {run.planned} of their intervals by interpolation" if run.planned else "plans none of them"
        sentences.append(
            f"these noise levels are not the ones the predictor was made for: it {what}, and the other calls are plain "
            f'ones. For its best quality use the scheduler "amed" with denoise 1 and steps {config.calls}.'
        )
    return sentences


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
