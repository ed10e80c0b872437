"""A stock sampler, scheduler and number of steps as the teacher: its pictures are the goal, whatever the ODE says."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..amed_core.driver import in_full
from ..amed_core.fit.teacher import Teacher, TeacherPath
from ..amed_core.types import Denoiser, Sample
from .training_inputs import RECIPE

REPEATABLE = 1e-6  # relative: by how much two runs of a sampler without noise of its own may differ
DISTILLED = ("Schnell", "Turbo", "Lightning", "LCM", "Klein", "Hyper")  # in names of models


@dataclass(frozen=True)
class Recipe(Teacher):
    """ComfyUI's sampler `sampler_name` on the levels of a scheduler."""

    sampler_name: str
    scheduler: str
    levels: tuple[float, ...]
    sampling: Any = field(default=None, compare=False, repr=False)  # the model's, which some samplers look at

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sampler_name} {self.scheduler}, {self.calls} steps"

    @property
    def calls(self) -> int:
        """Its steps."""
        return len(self.levels) - 1

    @cached_property
    def model_calls(self) -> int:
        """Model calls of each sample, found out on a model of nothing."""
        return len(self._run(_nothing, torch.zeros(1, 1, 4, 4))[1])

    def path(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """Where it passes the levels at which it asks the model: from noisy samples x (batch, ...) to its pictures.

        Where it asks twice at a level, or goes back to a higher one, the last answer counts.
        """
        end, asked = self._run(denoiser, x)
        kept: list[tuple[float, Sample, Sample]] = []
        for level, sample, denoised in asked:
            kept = [one for one in kept if one[0] > level * (1 + REPEATABLE)]
            kept.append((level, sample, (sample - denoised) / level))
        points = torch.stack([*(sample.cpu() for _, sample, _ in kept), end.cpu()])
        slopes = torch.stack([slope.cpu() for *_, slope in kept])
        made = TeacherPath((*(level for level, *_ in kept), self.levels[-1]), points, slopes)
        return made.halved() if half else made

    @torch.no_grad()
    def _run(self, denoiser: Denoiser, x: Sample, seed: int = 0) -> tuple[Sample, list[tuple[float, Sample, Sample]]]:
        """Its picture, and of every model call the level, the sample and the answer."""
        asked: list[tuple[float, Sample, Sample]] = []

        def model(sample: Sample, sigma: Tensor, **_: Any) -> Sample:
            level = float(sigma.flatten()[0])
            denoised, *_ = in_full(denoiser(sample, torch.tensor(level).to(sample)))
            asked.append((level, sample.clone(), denoised))
            return denoised

        sampler = comfy.samplers.sampler_object(self.sampler_name)
        levels = torch.tensor(self.levels).to(x)
        wrapped = _Wrapped(model, self.sampling)
        options = {"model_options": {"transformer_options": {"sample_sigmas": levels}}, "seed": seed}
        end: Sample = sampler.sampler_function(wrapped, x, levels, extra_args=options, callback=None, disable=True)
        return end, asked


class _Wrapped:
    """A function as what samplers take for a model."""

    def __init__(self, answer: Any, sampling: Any) -> None:
        self.answer = answer
        self.inner_model = _Inner(sampling)

    def __call__(self, x: Sample, sigma: Tensor, **more: Any) -> Sample:
        answered: Sample = self.answer(x, sigma, **more)
        return answered


class _Inner:
    """Where samplers look for the model's sampling."""

    def __init__(self, sampling: Any) -> None:
        self.inner_model = self
        self.model_sampling = sampling
        self.model_patcher = self

    def get_model_object(self, name: str) -> Any:
        """The model's sampling, which is all that is asked for."""
        del name
        return self.model_sampling


def _nothing(x: Sample, sigma: Tensor) -> Sample:
    return x / (1 + sigma**2)


def recipe(sampling: Any, sampler_name: str, scheduler: str, steps: int, node: str) -> Recipe:
    """The teacher of these settings on a model's levels.

    Raises ValueError for a sampler that adds noise of its own, or asks more of a model than answers, and for too few
    steps.
    """
    levels = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
    if sampler_name in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
        longer = comfy.samplers.calculate_sigmas(sampling, scheduler, steps + 1)
        levels = torch.cat([longer[:-2], longer[-1:]])
    made = Recipe(sampler_name, scheduler, tuple(levels.tolist()), sampling)
    try:
        noisy = adds_noise(made)
    except Exception as error:  # whatever a sampler of another pack asks for
        raise ValueError(
            f"{sampler_name} cannot be a teacher: it asks for more than a model's answers "
            f'({type(error).__name__}: {error}). Choose another teacher_sampler in "{node}".'
        ) from error
    if noisy:
        raise ValueError(
            f"{sampler_name} adds noise of its own: no student can reproduce its pictures. Choose a teacher_sampler "
            f'without "ancestral" or "sde" in its name, or teacher "converged", in "{node}".'
        )
    return made


def adds_noise(made: Recipe) -> bool:
    """Whether two runs from the same noise differ. Raises what the sampler raises if a model's answers do not do."""
    x = made.levels[0] * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ends.append(made._run(_nothing, x, seed)[0])
    return float((ends[1] - ends[0]).abs().max()) > REPEATABLE * float(ends[0].abs().max())


def advice(model: Any) -> str:
    """What to say of a model that was distilled for few steps, as far as its name tells; empty for others."""
    family = type(model.model.model_config).__name__
    if not any(word in family for word in DISTILLED):
        return ""
    return (
        f'{family} is distilled for few steps: teacher "{RECIPE}", with the sampler and steps of its makers, suits it.'
    )
