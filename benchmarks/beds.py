"""The models to measure on, each a function of a guidance scale: what `--models` of the benchmarks chooses among.

digits (EDM, bundled), colours (rectified flow), mixture (closed form, at Stable Diffusion's levels) and pictures, the
bundled text-to-picture model, whose guided ODE is stiff as those of large models are. Each sample of pictures asks for
another of its 1,357 drawings, and evaluation for others than those that a fit learns from.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.config import PredictorConfig
from amed_core.digits import DigitsDenoiser
from amed_core.fit.make import Settings, make_fit
from amed_core.fit.protocol import Fit
from amed_core.fit.teacher import heun_samples
from amed_core.fit.trajectories import chunks, conditioned, gaussian
from amed_core.pictures import PicturesDenoiser
from amed_core.types import Denoiser, Model, Sample
from benchmarks.colours import ColoursDenoiser
from benchmarks.mixture import MixtureDenoiser

MODELS: dict[str, Callable[[float], Model]] = {
    "mixture": MixtureDenoiser,
    "digits": DigitsDenoiser,
    "colours": ColoursDenoiser,
    "pictures": PicturesDenoiser,
}
UNSEEN = 1000  # samples from this number on ask for other drawings than a fit


class UnseenPictures(PicturesDenoiser):
    """The text-to-picture model, asked for other drawings than those that a fit learns from."""

    def for_rows(self, rows: Sequence[int]) -> PicturesDenoiser:
        return super().for_rows([row + UNSEEN for row in rows])


def judging(model: Model) -> Model:
    """The model as evaluation asks it, for drawings that no fit has seen where there are any."""
    return UnseenPictures(model.cfg, model.model) if isinstance(model, PicturesDenoiser) else model


def asked_for(model: Model, samples: int) -> Denoiser:
    """The model as evaluation samples ask for it."""
    return conditioned(judging(model), range(samples))


def taught(model: Model, x: Sample, calls: int, batch: int = 250) -> Sample:
    """Where the converged teacher takes evaluation noise x at the model's highest level."""
    low, high, flow = float(model.sigma_min), float(model.sigma_max), getattr(model, "flow", False)
    ends = []
    for rows in chunks(len(x), batch):
        asked = conditioned(judging(model), rows)
        ends.append(heun_samples(asked, x[rows.start : rows.stop], low, high, calls, flow=flow))
    return torch.cat(ends)


def fitted(model: Model, config: PredictorConfig, settings: Settings, seed: int = 0) -> Fit:
    """A finished fit of a predictor of these settings; the seed is that of noise and weights."""
    source = gaussian(model, tuple(model.shape), config.sigmas[0], seed)
    fit = make_fit(config, settings, source, model_sigmas=getattr(model, "sigmas", None), seed=seed)
    for _ in fit.events():
        pass
    return fit
