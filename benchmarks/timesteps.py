"""What interpolated timesteps gain over ComfyUI's rounded ones, without and with training.

    python benchmarks/timesteps.py --trajectories 960 --samples 500

Of the models here only digits can stand in for Stable Diffusion (flow models know no numbered timesteps): it is told
only the nearest of Stable Diffusion's 1,000 noise levels ("rounded"), or the level itself ("interpolated"), while x and
the answer are scaled by the true level, as in ComfyUI. The error is the RMSE to each model's own converged teacher.
"derivative" is the median relative error of the derivative of the model's answer by r, taken by the differences that
training takes, against the interpolated model's by five times smaller ones.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import ModelFacts, TrainConfig, sample, student_config
from amed_core.digits import SHAPE, DigitsDenoiser, precondition
from amed_core.fit.teacher import heun_samples
from amed_core.schedules import stable_diffusion_sigmas
from amed_core.types import Denoiser, Features, Method, Sample, Sigma
from benchmarks.beds import fitted

STEP = TrainConfig.step  # of the differences that training takes


class Rounded:
    """The digits model, told the nearest of Stable Diffusion's noise levels."""

    shape, sigma_min, sigma_max = DigitsDenoiser.shape, DigitsDenoiser.sigma_min, DigitsDenoiser.sigma_max

    def __init__(self, model: DigitsDenoiser) -> None:
        self.model = model
        self.logs = stable_diffusion_sigmas().log()

    def for_rows(self, rows: Sequence[int]) -> "Rounded":
        return Rounded(self.model.for_rows(rows))

    def __call__(self, x: Sample, sigma: Sigma) -> tuple[Sample, Features]:
        log = sigma.double().log().reshape(-1, 1)
        nearest = self.logs[(log - self.logs).abs().argmin(1)].exp().to(x).reshape(sigma.shape)
        # Asked at the nearest level with x scaled for it, the network sees what it should; its answer is scaled back.
        (c_in, _, c_skip, c_out), (near_in, _, near_skip, near_out) = precondition(x, sigma), precondition(x, nearest)
        inner = x * (c_in / near_in)
        denoised, features = self.model(inner, nearest)
        answer = (denoised - near_skip * inner) / near_out
        return c_skip * x + c_out * answer, features


def error(denoiser: Denoiser, x: Sample, method: Method, teacher: Sample) -> float:
    return float((sample(denoiser, x, method) - teacher).square().mean().sqrt())


def derivative_error(model: DigitsDenoiser, asked: Denoiser, x: Sample) -> float:
    """Of d denoised / d r in an interval in the middle of the range, where r is near 0.5."""
    start, end = torch.tensor(3.0), torch.tensor(0.5)
    exact = model.for_rows(range(len(x)))
    slope = (x * start - exact(x * start, start)[0]) / start

    def derivative(denoiser: Denoiser, r: float, step: float) -> Tensor:
        answers = []
        for at in (r - step, r + step):
            sigma = end**at * start ** (1 - at)
            answered = denoiser(x * start + (sigma - start) * slope, sigma)
            answers.append(answered[0] if isinstance(answered, tuple) else answered)
        return (answers[1] - answers[0]) / (2 * step)

    relative = []
    for r in torch.linspace(0.3, 0.7, 41).tolist():
        truth = derivative(exact, r, STEP / 5)
        relative.append(float((derivative(asked, r, STEP) - truth).norm() / truth.norm()))
    return sorted(relative)[len(relative) // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=960, help="of every fit")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--calls", type=int, nargs="+", default=[3, 5, 7])
    arguments = parser.parse_args()
    digits = DigitsDenoiser()
    table = stable_diffusion_sigmas()
    low, high = float(table[0]), float(table[-1])
    noise = torch.randn(arguments.samples, *SHAPE, generator=torch.Generator().manual_seed(10**9))
    rows = range(arguments.samples)
    models = {"rounded": Rounded(digits), "interpolated": digits}
    teachers = {
        name: heun_samples(model.for_rows(rows), noise * high, low, high, 200) for name, model in models.items()
    }
    apart = float((teachers["rounded"] - teachers["interpolated"]).square().mean().sqrt())
    print(f"the two converged teachers are {apart:.4f} apart")
    for name, model in models.items():
        print(f"derivative, {name}: {derivative_error(digits, model.for_rows(rows[:16]), noise[:16]):.3f}")
    print(f"{'calls':>5}  {'student':12}{'training':18}" + "".join(f"{name:>14}" for name in models), flush=True)
    for calls in tqdm(arguments.calls):
        for student in ("amed", "amed_dpm_2", "amed_ipndm"):
            config = student_config(student, calls, ModelFacts(low, high, bottleneck=True))
            results: dict[str, list[float]] = {"none (r = 0.5)": [], "each on its own": [], "on rounded": []}
            fits = {}
            for name, model in models.items():
                unlearned = error(model.for_rows(rows), noise * high, config.base_method(), teachers[name])
                results["none (r = 0.5)"].append(unlearned)
                training = TrainConfig(arguments.trajectories, batch_size=16, gradient="finite difference")
                with torch.enable_grad():
                    fits[name] = fitted(model, config, training).predictor.method()
            for name, model in models.items():
                x = noise * high
                results["each on its own"].append(error(model.for_rows(rows), x, fits[name], teachers[name]))
                results["on rounded"].append(error(model.for_rows(rows), x, fits["rounded"], teachers[name]))
            for training_name, errors in results.items():
                print(f"{calls:5}  {student:12}{training_name:18}" + "".join(f"{e:14.4f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
