"""AMED as ComfyUI sampler functions: `fn(model, x, sigmas, extra_args, callback, disable)`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core import PredictorConfig
from ..amed_core.call_list import Run, all_plain, call_sigmas, read
from ..amed_core.driver import NoMidpoint, Total, answers_of, raise_if_not_finite, trajectory
from ..amed_core.types import Sample, Sigma
from .bridge import ComfyDenoiser, foreign_code, guider_of, look, shows_guidance
from .pairing import differences, fingerprint, refuse_other_model, scale, scale_of_plan
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
    unplanned = _why_unplanned(run, config, guider)
    second = config.switch > 0 and levels[0] < config.switch_sigma  # the second of two models, in a run of its own
    warn([*_sentences(run, config, found, guider, second), *filter(None, [unplanned])])

    network = predictor.network
    if next(network.parameters()).device != x.device:  # the predictor belongs to other nodes as well: they keep theirs
        network = copy.deepcopy(network).to(x.device)
    if unplanned:
        run = all_plain(levels)
        solver, planner = config.build_solver(), NoMidpoint()
    else:
        solver = network.solver(run.sigmas, scale(guider))
        planner = network.planner(run.sigmas, run.plain, look(config, model), scale(guider))
    grid = torch.tensor(run.sigmas, dtype=torch.float64)
    mask = (extra_args or {}).get("denoise_mask")
    with tqdm(total=run.calls, disable=disable) as bar:
        report = Report(callback, bar, run.calls if levels[-1] == 0 else 0)
        sees = config.features == "bottleneck" and bool(run.planned)
        adds = scale_of_plan(config, scale(guider)) if config.guided and run.own_grid and not unplanned else None
        shown = {"bottleneck": sees, "guidance": adds}
        denoiser = ComfyDenoiser(model, extra_args or {}, levels, **shown, per_call=True, on_call=report)
        first = config.first if run.analytic_first_step else None
        answers: list[Total] = []
        for step in trajectory(denoiser, x, grid, solver, planner, first=first):
            answers += answers_of(step)
            x = step.x
            if mask is not None and step.index == len(run.sigmas) - 2 and levels[-1] == 0:
                x = torch.where(mask > 0, x, step.start.denoised)  # what is not to change is exact in the last answer
            del step  # its evaluations need not live through the next model call
        report.finish(x)
    raise_if_not_finite(answers)
    return x


class Report:
    """Tells ComfyUI of every model call as it comes, but of the `last` one of a run to 0 with the finished sample.

    That is what previews and `denoised_output` show at the end, and what a learned step makes of the last answer is
    nearer to the truth than the answer itself.
    """

    def __init__(self, callback: Callable[[dict[str, Any]], None] | None, bar: Any, last: int) -> None:
        self.callback = callback
        self.bar = bar
        self.last = last  # 0 if the run ends above 0
        self.calls = 0
        self.held: dict[str, Any] = {}

    def __call__(self, x: Sample, sigma: Sigma, denoised: Sample) -> None:
        told = {"x": x, "i": self.calls, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}
        self.calls += 1
        if self.calls == self.last:
            self.held = told
        else:
            self._tell(told)

    def finish(self, x: Sample) -> None:
        """The run is over, and this is its sample."""
        if self.held:
            self._tell({**self.held, "denoised": x})

    def _tell(self, told: dict[str, Any]) -> None:
        if self.callback is not None:
            self.callback(told)
        self.bar.update()


def _why_unplanned(run: Run, config: PredictorConfig, guider: Any) -> str | None:
    """Why no call of this run may be planned, as a sentence; None if it may."""
    kind = type(guider).__name__
    other = f'Use KSampler or CFGGuider with cfg {config.guidance:g}, or another sampler than an "amed" one.'
    if (file := foreign_code(guider)) is not None:
        return (
            f"another pack's code answers here in place of ComfyUI's own guider ({kind} of {file}), and may do more "
            f"than answer: all calls are plain ones. {other}"
        )
    if config.guided and run.own_grid and not shows_guidance(guider):
        return (
            f"the predictor steps along what guidance adds, but this guider ({kind}) adds up its answers unseen: all "
            f"calls are plain ones. {other}"
        )
    return None


def _sentences(run: Run, config: PredictorConfig, found: dict[str, Any], guider: Any, second: bool) -> list[str]:
    """What the user should know of a run before looking at its picture."""
    sentences = differences(config, found, guider, low=second)
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
