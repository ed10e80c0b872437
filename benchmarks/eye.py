"""Whether what the eye sees pays in a fit: the VAE's sensitivity as weights, and the teacher's energy in every band.

    python benchmarks/eye.py --json benchmarks/eye.json     # an hour; goes on where it stopped
    python benchmarks/tables.py                             # writes the table into docs/experiments.md

On the bundled text-to-picture model, for drawings and noises that no fit saw. Errors are RMSEs to the converged
teacher: "decoded" of pictures in [0, 1], "latent" of latents. Sharpness, variety and saturation are over the teacher's.

"weights": every channel of every band of frequency counts as much as decoded pictures change with it. That is measured
by 64 decodes, and the fit runs on samples that are scaled so: all that it fits is linear, and acts on each channel and
band alone, so that its weights hold for the samples as they are. "energy": the last step leaves the teacher's energy in
every band (`FitConfig.energy_calls`), which fits of few calls do unasked.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.driver import in_full, sample
from amed_core.fit.learner import Learner
from amed_core.fit.make import facts_of, make_fit, usual_settings
from amed_core.fit.protocol import Fit, FitConfig
from amed_core.fit.trajectories import conditioned, noise
from amed_core.pictures import PicturesDenoiser
from amed_core.samplers import MULTISTEP_STUDENT, student_config
from amed_core.spectrum import BANDS, bands, filled, from_spectrum, spectrum
from amed_core.tools.first import Bed
from amed_core.types import Answer, Denoiser, Method, Sample, Sigma
from benchmarks import looks
from benchmarks.first_pictures import options

DECODES = 64
PROBED = 8  # samples of every decode
USUAL_ERROR = 0.3  # of a student, by which samples are changed


class Scaled:
    """A model whose samples have every channel of every band multiplied by a factor (channels, BANDS)."""

    def __init__(self, model: PicturesDenoiser, factors: Tensor) -> None:
        self.model, self.factors = model, factors
        self.shape, self.flow, self.sigmas = model.shape, model.flow, model.sigmas
        self.sigma_min, self.sigma_max = model.sigma_min, model.sigma_max

    def scaled(self, x: Sample, power: float = 1.0) -> Sample:
        """Samples of the model as this one has them; with power -1 back."""
        return from_spectrum(spectrum(x) * self.factors.to(x)[:, bands(x)] ** power)

    def for_rows(self, rows: Sequence[int]) -> "Scaled":
        """The same, asked for the drawings of samples number `rows`."""
        return Scaled(self.model.for_rows(rows), self.factors)

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        denoised, features, guidance = in_full(self.model(self.scaled(x, -1.0), sigma))
        return self.scaled(denoised), features, None if guidance is None else self.scaled(guidance)


def sensitivity(model: PicturesDenoiser, samples: Sample) -> Tensor:
    """By how much decoded pictures change with each channel and band (channels, BANDS); their squares have the mean 1.

    The bands are put together to groups, so that the decodes are no more than DECODES.
    """
    of_band, channels = bands(samples), samples.shape[1]
    present = sorted(set(of_band.flatten().tolist()))
    sizes = [int((of_band == band).sum()) for band in present]
    groups = [[band] for band in present]
    while len(groups) * channels > DECODES:  # the smallest neighbours
        counts = [sum(sizes[present.index(band)] for band in group) for group in groups]
        least = min(range(1, len(groups) - 1), key=lambda n: counts[n] + counts[n + 1])
        groups[least : least + 2] = [groups[least] + groups[least + 1]]
    found, generator, base = torch.zeros(channels, BANDS), torch.Generator().manual_seed(0), pictures(model, samples)
    for group, channel in product(groups, range(channels)):
        inside = sum((of_band == band for band in group), torch.zeros_like(of_band, dtype=torch.bool))
        drawn = torch.zeros_like(samples)
        drawn[:, channel] = torch.randn(samples[:, channel].shape, generator=generator) * inside
        change = from_spectrum(USUAL_ERROR * drawn)
        seen = (pictures(model, samples + change) - base).square().sum() / change.square().sum()
        found[channel, group] = seen.sqrt()
    found = filled(found, (found == 0).all(0))
    return found / found[:, of_band].square().mean().sqrt()


def pictures(model: PicturesDenoiser, samples: Sample) -> Tensor:
    """Decoded samples (count, 3, height, width) in [0, 1]."""
    return ((model.images(samples.float()) + 1) / 2).clamp(0, 1)


def fitted(model: PicturesDenoiser | Scaled, calls: int, cfg: float, seed: int, energy_calls: int) -> Fit:
    """A fit by the usual effort, whose students keep the energy of bands up to so many calls."""
    config = student_config(MULTISTEP_STUDENT, calls, facts_of(model), guidance=cfg)
    settings = replace(cast(FitConfig, usual_settings(config)), energy_calls=energy_calls)
    fit = make_fit(config, settings, lambda rows: start(model, rows, seed), model_sigmas=model.sigmas)
    for _ in fit.events():
        pass
    return fit


def start(model: PicturesDenoiser | Scaled, rows: range, seed: int) -> tuple[Sample, Denoiser]:
    """Where trajectories begin, and what they ask."""
    x = model.sigma_max * noise(rows, tuple(model.shape), seed)
    return model.scaled(x) if isinstance(model, Scaled) else x, conditioned(model, rows)


def learned(model: PicturesDenoiser | Scaled, calls: int, count: int, draw: int) -> Method:
    """What the sampler that learns has learned from so many pictures."""
    config = student_config(MULTISTEP_STUDENT, calls, facts_of(model))
    learner = Learner(config, model_sigmas=model.sigmas)
    for row in range(100 * draw, 100 * draw + count):
        x, asked = start(model, range(row, row + 1), draw)
        learner.learn(asked, x, learner.taught(asked, x))
    return learner.chosen.table.method()


def judged(bed: Bed, method: Method, teacher: Sample, shown: Tensor) -> dict[str, float]:
    """How far a method's samples are from the teacher's, and how they look beside them."""
    drawn = torch.cat([sample(asked, x, method) for asked, x, _ in bed.parts])
    decoded = pictures(bed.model, drawn)  # type: ignore[arg-type]
    ours, theirs = (some.movedim(1, -1).double().numpy() for some in (decoded, shown))
    error, median = (of((decoded - shown).square().mean((1, 2, 3))) for of in (torch.mean, torch.median))
    return {
        "decoded": math.sqrt(float(error)),
        "decoded_median": math.sqrt(float(median)),
        "latent": float((drawn - teacher).square().mean().sqrt()),
        "sharpness": looks.sharpness(ours, theirs)[1],
        "variety": float(decoded.var(0).mean() / shown.var(0).mean()),
        "saturation": looks.saturation(ours) / looks.saturation(theirs),
    }


def fits(model: PicturesDenoiser, factors: Tensor, calls: int, cfg: float, seed: int) -> dict[str, Method]:
    """Those of a seed, by name."""
    scaled = Scaled(model, factors)
    asked = {"plain": (model, 0), "energy": (model, calls), "weights": (scaled, 0), "weights, energy": (scaled, calls)}
    return {name: fitted(one, calls, cfg, seed, kept).predictor.method() for name, (one, kept) in asked.items()}


def pupils(model: PicturesDenoiser, factors: Tensor, calls: int, seed: int) -> dict[str, Method]:
    """Those that learned from pictures, by name."""
    found = {}
    for count in (1, 8):
        found[f"learned from {count}"] = learned(model, calls, count, seed)
        found[f"learned from {count}, weights"] = learned(Scaled(model, factors), calls, count, seed)
    return found


@torch.no_grad()
def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.set_defaults(calls=[3, 4, 5, 8], samples=96, batch=24)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for cfg in asked.cfg:
        model = PicturesDenoiser(cfg)
        bed: Bed | None = None
        for calls, seed in product(asked.calls, asked.seeds):
            here = {"cfg": cfg, "calls": calls, "seed": seed, "samples": asked.samples}
            if any(here.items() <= row.items() for row in rows):
                continue
            bed = bed or Bed(model, None, asked.samples, asked.batch)
            teacher = torch.cat([end for *_, end in bed.parts])
            shown = pictures(model, teacher)
            x, first = start(model, range(PROBED), 0)
            factors = sensitivity(model, bed.converged(first, x, bed.top))
            for name, method in {
                **fits(model, factors, calls, cfg, seed),
                **pupils(model, factors, calls, seed),
            }.items():
                rows.append(here | {"method": name} | judged(bed, method, teacher, shown))
                print(json.dumps(rows[-1]), flush=True)
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
