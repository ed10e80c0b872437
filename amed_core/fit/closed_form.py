"""Weights of a multistep method in closed form, interval by interval, from a teacher's path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..driver import evaluate
from ..multistep import MultistepTable
from ..solvers import Multistep, multistep_vectors
from ..spectrum import BANDS, bands, filled, spectrum
from ..types import History, Sample, Stage
from .targets import Goal
from .teacher import Path
from .workers import ALONE, Workers

RIDGE = 1e-5  # how strongly weights are held at those they start from, relative to what their slopes explain
BAND_RIDGE = 0.03  # how strongly a band's are held at the weights of all bands, relative to a usual band of its size
NO_FLOAT64 = ("mps", "xpu", "privateuseone")  # devices that have none, or may have none; their sums are the CPU's


@dataclass
class Run:
    """A batch on its way."""

    goal: Goal
    path: Path
    x: Sample
    history: History = ()


@torch.no_grad()
def least_squares(
    table: MultistepTable, batches: Sequence[tuple[Goal, Path]], workers: Workers = ALONE, ridge: float = RIDGE
) -> tuple[MultistepTable, list[Sample]]:
    """The table with the weights that lead nearest to the teacher at every level, from where they led before.

    Minimises |x + (sigma_next - sigma) (sum_j w_j slope_j + v denoised_0 + sum_j u_j guidance_slope_j)
    - teacher(sigma_next)|^2 + ridge |w - w_0|^2, with w_0 the weights of `table`, which is of one guidance scale; u is
    there if it is guided. A spectral table then takes the weights of every band in the same way, held at those of all.
    Also returns where the batches end then: it takes one run.
    """
    config, levels = table.config, table.config.sigmas
    made = MultistepTable(config)
    made.load_state_dict(table.state_dict())
    planner, runs = table.planner(), [Run(goal, path, goal.x) for goal, path in batches]
    for k in range(len(levels) - 1):
        known = table.known(k)
        count = len(known) * (1 + config.guided) + 1
        # Of every band, or of one that holds all: inner products of what is added up, and with where it should lead.
        sums = Sums.zeros(BANDS if config.spectral else 1, count)
        for run in runs:
            x, sigma = planner.carried(k, run.x, torch.tensor(levels[k]).to(run.x))
            run.history = (*run.history, evaluate(run.goal.denoiser, x, sigma, planner.told(k, sigma)))
            moved = (run.path.at(levels[k + 1])[0].to(x) - x) / (levels[k + 1] - float(sigma))
            sums.add([*multistep_vectors(run.history[known.start :], guided=config.guided), moved])
        sums.products, sums.sizes = workers.sum(sums.products), workers.sum(sums.sizes)
        row = sums.solved(table.row(k), ridge)
        parts = torch.tensor_split(row, [len(known), len(known) + 1])
        made.weights[k, known], made.first[k] = parts[0].to(made.weights), row[len(known)]
        if config.guided:
            made.guided[k, known] = parts[2].to(made.weights)
        weights, first, guided = (tuple(part.tolist()) for part in parts)
        spectral: tuple[Tensor, ...] = ()
        if config.spectral:
            apart = sums.solved_apart(row)
            made.spectral[k, made.vectors(k)] = apart.to(made.spectral)
            spectral = (apart,)
        nothing: tuple[tuple[float, ...], ...] = ((),) * k
        solver = Multistep(
            (*nothing, weights),
            (*(0.0,) * k, *first),
            (*nothing, guided) if config.guided else (),
            (*(torch.empty(0),) * k, *spectral) if spectral else (),
            config.switch,
        )
        for run in runs:
            run.x = solver.to_next(run.history, torch.tensor(levels[k + 1]).to(run.x), None, Stage(k + 1, k + 1))
    return made, [run.x for run in runs]


@dataclass
class Sums:
    """Inner products (bands, vectors + 1, vectors + 1) of what is added up and, last, of where it should lead."""

    products: Tensor
    sizes: Tensor  # coefficients in each band, of all that was summed

    @classmethod
    def zeros(cls, count: int, vectors: int) -> "Sums":
        """Of nothing yet; one band holds all frequencies."""
        return cls(torch.zeros(count, vectors + 1, vectors + 1, dtype=torch.float64), torch.zeros(count).double())

    def add(self, vectors: Sequence[Sample]) -> None:
        """Add a batch's."""
        stacked = torch.stack(list(vectors))
        stacked = (stacked.cpu() if stacked.device.type in NO_FLOAT64 else stacked).double()
        if len(self.sizes) == 1:
            parts = {0: stacked.flatten(1)}
        else:
            of_band = bands(stacked[0])
            coefficients = torch.stack([spectrum(v) for v in stacked])
            parts = {n: coefficients[..., of_band == n].flatten(1) for n in sorted(set(of_band.flatten().tolist()))}
        for n, part in parts.items():
            self.products[n] += (part @ part.T).cpu()
            self.sizes[n] += part.shape[1]

    def solved(self, start: Tensor, ridge: float) -> Tensor:
        """The weights (vectors,) of all bands together, held at `start`."""
        total = self.products.sum(0)
        normal, right = total[:-1, :-1], total[:-1, -1]
        held = ridge * normal.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
        row: Tensor = torch.linalg.solve(normal + held, right + held @ start)
        return row

    def solved_apart(self, together: Tensor) -> Tensor:
        """What the weights differ by in each band (vectors, bands)."""
        usual = BAND_RIDGE * self.products.sum(0)[:-1, :-1] / self.sizes.sum()
        apart = torch.zeros(len(together), len(self.sizes), dtype=torch.float64)
        for n, (products, size) in enumerate(zip(self.products, self.sizes, strict=True)):
            normal, right = products[:-1, :-1], products[:-1, -1]
            floor = RIDGE * normal.diagonal().mean() * torch.eye(len(together), dtype=torch.float64)
            if size:
                apart[:, n] = torch.linalg.solve(normal + usual * size + floor, right - normal @ together)
        return filled(apart, self.sizes == 0)
