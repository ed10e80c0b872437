"""AMED as ComfyUI sampler functions: `fn(model, x, sigmas, extra_args, callback, disable)`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..amed_core.call_list import all_plain, run_of
from ..amed_core.config import PredictorConfig, same_levels
from ..amed_core.predictor import Predictor
from ..amed_core.samplers import MULTISTEP_STUDENT, NAMES, sampler_name
from ..amed_core.types import Run, Sample
from .bridge import foreign_code, guider_of, leaves_out_negative, look, shows_guidance
from .drawing import draw
from .finding import found as found_file
from .learning import AUTOMATICALLY, NEVER, learning_of, sample_learning
from .own_grid import is_own, placeholder
from .pairing import differences, fingerprint, refuse_other_model, scale, scale_of_plan
from .values import ATTACHMENT, SCHEDULER, NotedPredictor, input_of_running, note, shortened, warn

ANY = "amed"  # the entry of the sampler list that runs whatever predictor there is, of any sampler
LEARNING = (ANY, MULTISTEP_STUDENT)  # entries that learn where there is none


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

    Without one it takes the newest file that fits (see `finding`). Without such a file, or where a multistep one was
    made for other levels, it learns (see `learning`). `x` (batch, ...) is noisy at the first of `sigmas` (levels,).
    `name` is the chosen entry of the sampler list: "amed" runs predictors of any sampler, the others of their own.
    Raises ValueError for a predictor of another model or sampler, and for levels that no sampler could follow.
    Raises FloatingPointError if the model answered NaN or infinity.
    """
    if len(sigmas) < 2:
        return x
    guider = guider_of(model)
    patcher = guider.model_patcher
    predictor = predictor or patcher.get_attachment(ATTACHMENT)
    levels = sigmas.tolist()
    chosen: Predictor | None = None
    if predictor is None and name in LEARNING:
        look_for = learning_of(patcher).mode == AUTOMATICALLY
        file = found_file(guider, levels, None if name == ANY else name) if look_for else None
        if file is None:
            return sample_learning(model, x, sigmas, extra_args or {}, callback, disable)
        predictor, chosen, levels = file.predictor, file.one, list(file.levels)
        note([f"{len(levels) - 1} calls with {shortened(file.name)}."])
    if predictor is None:
        raise ValueError(
            f'The sampler "{name}" needs a predictor, but the MODEL has none. Add the node "AMED Apply Predictor" '
            'between your model and the sampler, or choose another sampler: "amed" learns while it samples.'
        )
    config = predictor.config
    made_for = sampler_name(config)
    if name not in (None, ANY, made_for):
        raise ValueError(
            f'The applied predictor was made for the sampler "{made_for}", but "{name}" is chosen. Choose "{ANY}" as '
            'sampler_name, which runs every predictor, or another file in "AMED Load Predictor".'
        )
    found = fingerprint(patcher)
    refuse_other_model(config, found)
    chosen = chosen or _chosen(predictor, levels, guider)
    if chosen is None and learning_of(patcher).mode != NEVER:
        return sample_learning(model, x, sigmas, extra_args or {}, callback, disable, predictor.every)
    one = chosen or predictor.predictor
    config = one.config
    levels = list(config.sigmas) if chosen is not None and _starts_alike(config, levels) else levels
    run = run_of(levels, config)
    unplanned = _why_unplanned(run, config, guider)
    second = config.switch > 0 and levels[0] < config.switch_sigma  # the second of two models, in a run of its own
    asked_anyway = None if unplanned else _why_asked_anyway(run, config, guider)
    warn([*_sentences(run, config, found, guider, second), *filter(None, [unplanned])])
    note([*filter(None, [asked_anyway])])

    learned = _on(x.device, one)
    if unplanned:
        run, method = all_plain(levels), config.plain_method(levels)
    else:
        method = learned.method(run, guidance=scale(guider), look=look(config, model))
    adds = scale_of_plan(config, scale(guider)) if config.guided and run.own_grid and not unplanned else None
    return draw(
        model,
        x,
        levels,
        method,
        extra_args or {},
        callback,
        disable,
        bottleneck=config.features == "bottleneck" and bool(run.planned),
        guidance=adds,
    )


def _chosen(predictor: NotedPredictor, levels: list[float], guider: Any) -> Predictor | None:
    """The predictor that knows what to do at these levels; a multistep one does only on its own. None without one.

    Where the levels are the scheduler's own, they only say where a run starts and in how many calls.
    """
    every, at = predictor.every, scale(guider)
    if predictor.config.kind != "multistep":
        return predictor.predictor
    if predictor.config.switch:
        return every.made_for(levels, at) or predictor.predictor
    if levels[-1] == 0 and is_own(levels, guider.inner_model.model_sampling, every):
        return every.from_level(levels[0], len(levels) - 1, at) or every.made_for(levels, at)
    return every.made_for(levels, at)


def _starts_alike(config: PredictorConfig, levels: list[float]) -> bool:
    """Whether a run is a predictor's whole one, whatever the levels between its ends."""
    return same_levels(levels[:1], config.sigmas[:1]) and len(levels) == len(config.sigmas) and levels[-1] == 0


def _on(device: torch.device, predictor: Predictor) -> Predictor:
    """The predictor on a device: itself, or a copy, since other nodes hold it too."""
    if next(predictor.parameters()).device == device:
        return predictor
    return copy.deepcopy(predictor).to(device)


def _why_unplanned(run: Run, config: PredictorConfig, guider: Any) -> str | None:
    """Why no call of this run may be planned, as a sentence; None if it may."""
    kind = type(guider).__name__
    other = f'Use KSampler or CFGGuider with cfg {config.guidance:g}, or another sampler than an "amed" one.'
    if (file := foreign_code(guider)) is not None:
        return (
            "all calls are plain: another pack's code answers here. It stands in place of ComfyUI's own guider "
            f"({kind} of {file}) and may do more than answer. {other}"
        )
    if config.guided and run.own_grid and not shows_guidance(guider):
        return (
            "all calls are plain: this guider adds up its answers unseen. The predictor steps along what guidance "
            f"adds, which {kind} does not show. {other}"
        )
    return None


def _why_asked_anyway(run: Run, config: PredictorConfig, guider: Any) -> str | None:
    """Why the negative is asked at calls where the predictor could do without, as a sentence; None if it is not."""
    if not config.negatives or not run.own_grid or leaves_out_negative(guider, guider.model_options):
        return None
    return (
        "the negative is asked at every call, which takes longer. The picture is as good. The predictor asks it at "
        f"{len(config.negatives)} of {config.calls} calls, but a node on the model changes guidance and may need it."
    )


def _sentences(run: Run, config: PredictorConfig, found: dict[str, Any], guider: Any, second: bool) -> list[str]:
    """What the user should know of a run before looking at its picture."""
    sentences = differences(config, found, guider, low=second)
    if not run.own_grid:
        planned = f"it plans {run.planned} of their intervals by interpolation, and the other calls are plain ones"
        sentences.append(
            f'Set scheduler "amed", denoise 1, steps {config.calls} for its best. These noise levels are not the ones '
            f"the predictor was made for: {planned if run.planned else f'all {run.calls} calls are plain ones'}."
        )
    return sentences


def sampler_functions() -> dict[str, Callable[..., Sample]]:
    """One function per entry of the sampler list."""
    return {name: partial(sample_amed, name=name) for name in NAMES}


def _without_our_sampler(chosen: Any, has_predictor: bool) -> list[str]:
    """What the user of another sampler with this scheduler should know; nothing where the sampler is one of ours.

    A scheduler is told nothing of the sampler. KSampler and its like have both as widgets.
    """
    if not isinstance(chosen, str) or chosen in NAMES:
        return []
    why = (
        f"{chosen} leaves the predictor unused, and takes its noise levels alone"
        if has_predictor
        else f"{chosen} learns nothing, and without a predictor these noise levels are nothing special"
    )
    return [f'Set sampler_name "{ANY}".', f'Only with it does the scheduler "{SCHEDULER}" gain anything: {why}.']


def scheduler(model_sampling: Any, steps: int) -> Tensor:
    """The scheduler list's entry: the applied predictor's noise levels, one per model call.

    Without a predictor a sampler that learns chooses its own, and these only say where pictures start and end. Another
    sampler than ours takes them as it takes any others: it draws a sound picture, and the node says what it lacks.
    """
    predictor = getattr(model_sampling, ATTACHMENT, None)
    warn(_without_our_sampler(input_of_running("sampler_name"), predictor is not None))
    if predictor is None:
        return placeholder(model_sampling, steps)
    return torch.tensor(predictor.every.sigmas(steps), dtype=torch.float32)
