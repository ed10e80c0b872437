"""Which predictor a config stands for, one of several guidance scales, and sets of them for several uses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .call_list import call_sigmas
from .config import TOLERANCE, PredictorConfig
from .driver import sample
from .features import POOLED
from .midpoints import MidpointTable
from .multistep import MultistepTable, moved
from .network import AMEDPredictor
from .types import Answer, Sample, Sigma

MOST_PREDICTORS = 256  # in a set
START_WITHIN = math.log(1.25)  # of the logarithms of levels: how far from what was learned an image may start

Predictor = AMEDPredictor | MidpointTable | MultistepTable


def build(config: PredictorConfig, generator: torch.Generator | None = None) -> Predictor:
    """The predictor of these settings, not trained; the generator draws a network's weights."""
    if config.kind == "multistep":
        return MultistepTable(config)
    return MidpointTable(config) if config.kind == "table" else AMEDPredictor(config, generator)


def outline(config: PredictorConfig) -> Predictor:
    """The predictor of these settings without its numbers: names and shapes alone, on the meta device."""
    with torch.device("meta"):
        return build(config)


def check_numbers(predictor: Predictor, numbers: Mapping[str, Tensor]) -> None:
    """Raise ValueError for numbers of a predictor, by name, that no fit gives."""
    if not all(bool(values.isfinite().all()) for values in numbers.values()):
        raise ValueError("some of its weights are NaN or infinite")
    for values in numbers.values():
        lowest, highest = torch.tensor(predictor.config.limits, dtype=torch.float64)
        rounding = max(torch.finfo(dtype).eps for dtype in (values.dtype, torch.float32))
        if bool(((values < lowest - rounding) | (values > highest + rounding)).any()):
            raise ValueError("some of its weights are out of their range")


@torch.no_grad()
def stacked(config: PredictorConfig, tables: Sequence[Predictor]) -> Predictor:
    """One table for all of `config.guidances` from a table for each, on the same grid."""
    made = build(config)
    parts = [dict(table.named_parameters()) for table in tables]
    for name, values in made.named_parameters():
        values.copy_(torch.stack([part[name] for part in parts]))
    return made


@torch.no_grad()
def asked_levels(predictor: Predictor) -> tuple[float, ...]:
    """The noise levels that a model is told, call by call, in a run on the predictor's grid.

    A network decides by what it sees; here it sees nothing.
    """
    model, channels = _Nothing([]), max(predictor.config.channels, 1)
    x = torch.zeros(1, channels, POOLED, POOLED)
    sample(model, x, predictor.method(guidance=predictor.config.guidance))
    return tuple(model.asked)


@dataclass(frozen=True)
class _Nothing:
    """A model that answers 0, and remembers what it was asked."""

    asked: list[float]

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        self.asked.append(float(sigma.flatten()[0]))
        return torch.zeros_like(x), x.new_zeros(len(x), POOLED, POOLED), torch.zeros_like(x)

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The same without guidance."""
        denoised, features, *_ = self(x, sigma)
        return denoised, features, None


@dataclass(frozen=True)
class PredictorSet:
    """Predictors of one model, for several numbers of calls, starting levels and guidance scales.

    The first is meant where only one is asked for. Raises ValueError for none, for more than MOST_PREDICTORS, and for
    several that are not multistep tables of one model.
    """

    predictors: tuple[Predictor, ...]

    def __post_init__(self) -> None:
        configs = [one.config for one in self.predictors]
        if not configs:
            raise ValueError("A set needs at least one predictor.")
        if len(configs) > MOST_PREDICTORS:
            raise ValueError(f"A set has at most {MOST_PREDICTORS} predictors, but found {len(configs)}.")
        if len(configs) > 1:
            if any(config.kind != "multistep" for config in configs):
                raise ValueError("Only multistep predictors, those for amed_multistep, go together in a set.")
            spans = {(config.sigma_min, config.sigma_max, config.flow) for config in configs}
            if len(spans) > 1:
                raise ValueError(f"A set is for one model, but these have other noise levels: {sorted(spans)}.")

    @property
    def main(self) -> Predictor:
        """The first."""
        return self.predictors[0]

    @property
    def from_noise(self) -> tuple[Predictor, ...]:
        """Those that begin where the first does, by rising numbers of calls."""
        begin = self.main.config.sigmas[0]
        found = (one for one in self.predictors if math.isclose(one.config.sigmas[0], begin, rel_tol=TOLERANCE))
        return tuple(sorted(found, key=lambda one: one.config.calls))

    @property
    def calls(self) -> tuple[int, ...]:
        """Their numbers of calls, rising."""
        return tuple(sorted({one.config.calls for one in self.from_noise}))

    def sigmas(self, calls: int) -> tuple[float, ...]:
        """The levels of so many calls from where runs begin: a predictor's own, or those that interpolate the nearest.

        Raises ValueError for fewer calls than 1.
        """
        return call_sigmas(min(self.from_noise, key=lambda one: abs(one.config.calls - calls)).config, calls)

    def made_for(self, sigmas: Sequence[float], guidance: float | None = None) -> Predictor | None:
        """The one whose own levels these are, from its beginning or from its second model's; None without one."""
        found = [one for one in self.predictors if one.config.begins_at(sigmas) is not None]
        return _nearest(found, guidance) if found else None

    def starting_at(self, sigma: float, calls: int, guidance: float | None = None) -> Predictor | None:
        """The one for so many calls from a level, or, of those for images, from the nearest one within START_WITHIN."""
        same = [one for one in self.predictors if one.config.calls == calls and not one.config.switch]

        def apart(one: Predictor) -> float:
            begin = one.config.sigmas[0]
            if math.isclose(begin, sigma, rel_tol=TOLERANCE):
                return 0.0
            return math.inf if one.config.from_noise else abs(math.log(begin / sigma))

        least = min(map(apart, same), default=math.inf)
        return _nearest([one for one in same if apart(one) == least], guidance) if least <= START_WITHIN else None

    def from_level(self, sigma: float, calls: int, guidance: float | None = None) -> Predictor | None:
        """What `starting_at` finds, with its grid drawn out or together so that it starts at the very level."""
        one = self.starting_at(sigma, calls, guidance)
        if not isinstance(one, MultistepTable) or math.isclose(sigma, one.config.sigmas[0], rel_tol=TOLERANCE):
            return one
        return moved(one, sigma) if sigma > one.config.sigmas[-2] else None

    def merged(self, others: "PredictorSet") -> "PredictorSet":
        """This set with all of another, which takes the place of what is for the same use."""

        def use(one: Predictor) -> tuple[int, float, float, tuple[float, ...]]:
            config = one.config
            return config.calls, round(config.sigmas[0], 6), config.guidance, config.guidances

        uses = {use(one): one for one in (*self.predictors, *others.predictors)}
        return PredictorSet(tuple(uses.values()))


def _nearest(predictors: Iterable[Predictor], guidance: float | None) -> Predictor:
    """The one whose guidance scale, or range of them, is nearest; the first of equals."""

    def apart(one: Predictor) -> float:
        scales = one.config.guidances or (one.config.guidance,)
        return 0.0 if guidance is None else max(scales[0] - guidance, guidance - scales[-1], 0.0)

    return min(predictors, key=apart)
