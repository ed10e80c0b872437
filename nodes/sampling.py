"""AMED as ComfyUI sampler functions: `fn(model, x, sigmas, extra_args, callback, disable)`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.call_list import all_plain, call_sigmas, read
from ..amed_core.config import PredictorConfig
from ..amed_core.driver import Total, answers_of, raise_if_not_finite, trajectory
from ..amed_core.predictor import Predictor
from ..amed_core.samplers import NAMES, sampler_name
from ..amed_core.types import Run, Sample, Sigma
from .bridge import ComfyDenoiser, foreign_code, guider_of, look, shows_guidance
from .pairing import differences, fingerprint, refuse_other_model, scale, scale_of_plan
from .values import ATTACHMENT, NotedPredictor, warn

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
    predictor: NotedPredictor | None = None,
) -> Sample:
    """Sample with `predictor`, or with the one applied to the model, and return the sample at the last level.

    `x` (batch, ...) is noisy at the first of `sigmas` (levels,). `name` is the chosen entry of the sampler list.
    Raises ValueError for a predictor of another model or sampler, and for levels that no sampler could follow.
    Raises FloatingPointError if the model answered NaN or infinity.
    """
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
    config = predictor.config
    made_for = sampler_name(config)
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

    learned = _on(x.device, predictor.predictor)
    if unplanned:
        run, method = all_plain(levels), config.plain_method(levels)
    else:
        method = learned.method(run, guidance=scale(guider), look=look(config, model))
    mask = (extra_args or {}).get("denoise_mask")
    with tqdm(total=run.calls, disable=disable) as bar:
        report = Report(callback, bar, run.calls if levels[-1] == 0 else 0)
        adds = scale_of_plan(config, scale(guider)) if config.guided and run.own_grid and not unplanned else None
        denoiser = ComfyDenoiser(
            model,
            extra_args or {},
            levels,
            bottleneck=config.features == "bottleneck" and bool(run.planned),
            guidance=adds,
            per_call=True,
            on_call=report,
        )
        answers: list[Total] = []
        for step in trajectory(denoiser, x, method):
            answers += answers_of(step)
            x = step.x
            if mask is not None and step.index == len(run.sigmas) - 2 and levels[-1] == 0:
                x = torch.where(mask > 0, x, step.start.denoised)  # masked pixels are exact in the last answer
            del step  # its evaluations need not live through the next model call
        report.finish(x)
    raise_if_not_finite(answers)
    return x


def _on(device: torch.device, predictor: Predictor) -> Predictor:
    """The predictor on a device: itself, or a copy, since other nodes hold it too."""
    if next(predictor.parameters()).device == device:
        return predictor
    return copy.deepcopy(predictor).to(device)


class Report:
    """Tells ComfyUI of every model call as it comes.

    In a run to 0 it tells of the `last` call with the finished sample in place of the model's answer. Previews and
    `denoised_output` show that. A learned last step is nearer to the truth than the answer itself.
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
    return {name: partial(sample_amed, name=name) for name in NAMES}


def scheduler(model_sampling: Any, steps: int) -> Tensor:
    """The scheduler list's entry: the applied predictor's noise levels, one per model call."""
    predictor = getattr(model_sampling, ATTACHMENT, None)
    if predictor is None:
        raise ValueError(
            f'The scheduler "{SCHEDULER}" gives the grid of an applied predictor, but the MODEL has none. Add the '
            'node "AMED Apply Predictor" last before the sampler (after any model sampling or shift node), or choose '
            "another scheduler."
        )
    return torch.tensor(call_sigmas(predictor.config, steps), dtype=torch.float32)
