"""Weights of a multistep method in closed form, interval by interval, from a teacher's path.

It needs a denoiser, noisy samples and the teacher's path from them: no fit, no source, no file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from ..driver import asked
from ..multistep import MultistepTable
from ..solvers import multistep_vectors
from ..spectrum import BANDS, bands, carried, filled, spectrum
from ..types import Denoiser, Evaluation, History, Sample
from .finite import finite
from .huber import squares
from .teacher import PIECE, TeacherPath, left_of_errors
from .workers import ALONE, Workers

RIDGE = 1e-5  # how strongly weights are held at those they start from, relative to what their slopes explain
CAP = 1.5  # medians: what the energy of an outlier's residual counts at most
PRIOR_WEIGHT = 64.0  # of weights learned from few trajectories: measured best from 4 to 1,000
LEAST_LEFT_OUT = 4  # trajectories that show by one another how strongly to hold weights of bands
HOLDS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)  # among which they choose
LEAST_RIDGE = 1e-6  # relative to the mean diagonal
REWEIGHTINGS = 8
AT_ONCE = 1 << 20  # coefficients whose products are taken at once, in float64
GAINS = (0.5, 2.0)  # of an aim, between which one may give samples its energy
NO_FLOAT64 = ("mps", "xpu", "privateuseone")  # devices that have none, or may have none; their sums are the CPU's
LEARNED_FROM = "The model's answers, from which a method was to learn,"


@dataclass(frozen=True)
class NormalEquations:
    """What one interval adds up, and where that should lead, as inner products: one matrix per trajectory.

    They are a few kilobytes, from which weights follow for any choice of trajectories without running them again.
    """

    products: Tensor  # (trajectories, bands, vectors + 1, vectors + 1), in float64 on the CPU; the last is the aim
    sizes: Tensor  # (bands,), coefficients of a trajectory in each band

    @classmethod
    def of(cls, vectors: Sequence[Sample], aim: Sample, *, spectral: bool) -> "NormalEquations":
        """Of a batch: vectors and aim (batch, channels, ...). Spectral ones have bands apart, else there is one."""
        if not spectral:
            values = torch.tensor([float(aim[0].numel())], dtype=torch.float64)
            return cls(inner_products((*vectors, aim))[:, None], values)
        of_band, count = bands(aim), len(vectors) + 1
        products = torch.zeros(len(aim), BANDS, count, count, dtype=torch.float64)
        sizes = aim.shape[1] * torch.bincount(of_band.flatten().cpu(), minlength=BANDS).double()
        of_band = of_band.byte()  # they are as many as the samples' elements
        for rows, channels in _pieces(aim, count):
            every = (v[rows, channels] for some in (vectors, (aim,)) for v in some)
            coefficients = _spectra(every, count, aim[rows, channels])
            coefficients, places = coefficients.flatten(3), of_band.flatten().to(coefficients.device)
            for n in sizes.nonzero().flatten().tolist():
                for some in (places == n).nonzero().flatten().split(PIECE):
                    part = coefficients[..., some].flatten(2).double()
                    products[rows, n] += (part @ part.mT).cpu()
        return cls(finite(products, LEARNED_FROM), sizes)

    def total(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Products (bands, ...) and sizes (bands,) summed over trajectories, each times its weight (trajectories,)."""
        counted = torch.ones(len(self.products), dtype=torch.float64) if weights is None else weights.double()
        return torch.einsum("t,tbij->bij", counted, self.products), self.sizes * counted.sum()

    def residuals(self, weights: Tensor) -> Tensor:
        """What is left of the aim with these weights (vectors, bands): the mean square of every trajectory's values."""
        signed = torch.cat([weights.double(), -torch.ones(1, weights.shape[1], dtype=torch.float64)])
        left = torch.einsum("ib,tbij,jb->t", signed, self.products, signed) / self.sizes.sum()
        return left.clamp(min=torch.finfo(torch.float64).tiny)


def inner_products(vectors: Sequence[Sample]) -> Tensor:
    """Those of vectors (batch, ...) with one another: (batch, vectors, vectors), in float64 on the CPU.

    They are added up in pieces, which take little memory beside the vectors. Raises FloatingPointError if they are not
    finite.
    """
    flat = [vector.flatten(1) for vector in vectors]
    size = max(PIECE // len(flat[0]), 1)
    parts = ([v[:, begin : begin + size] for v in flat] for begin in range(0, flat[0].shape[1], size))
    return finite(torch.stack([part @ part.mT for part in map(_stacked, parts)]).sum(0).cpu(), LEARNED_FROM)


def _pieces(like: Sample, vectors: int) -> Iterator[tuple[slice, slice]]:
    """Trajectories and channels of samples (batch, channels, ...), of each so many that their vectors are AT_ONCE."""
    at_once = max(AT_ONCE // (vectors * like[0, 0].numel()), 1)
    rows, channels = max(at_once // like.shape[1], 1), min(at_once, like.shape[1])
    for row, channel in product(range(0, len(like), rows), range(0, like.shape[1], channels)):
        yield slice(row, row + rows), slice(channel, channel + channels)


def _spectra(vectors: Iterable[Sample], count: int, like: Sample) -> Tensor:
    """The cosine coefficients (batch, count, ...) of vectors, in float32 or as exact as they are."""
    device = "cpu" if like.device.type in NO_FLOAT64 else like.device
    exact = torch.promote_types(like.dtype, torch.float32)
    made = torch.empty(len(like), count, *like.shape[1:], dtype=exact, device=device)
    for number, vector in enumerate(vectors):
        made[:, number] = spectrum(vector.to(made))
    return made


def sum_of_parts(parts: Sequence[NormalEquations]) -> NormalEquations:
    """Of the same trajectories' elements, a part of them in each."""
    products, sizes = (torch.stack(kept).sum(0) for kept in zip(*((p.products, p.sizes) for p in parts), strict=True))
    return NormalEquations(products, sizes)


def joined(parts: Sequence[NormalEquations], spectral: bool, vectors: int) -> tuple[Tensor, Tensor]:
    """Products (trajectories, bands, vectors, vectors) of no batch or more, and sizes (bands,) of all together."""
    none = torch.zeros(0, BANDS if spectral else 1, vectors, vectors, dtype=torch.float64)
    sizes = sum((one.sizes * len(one.products) for one in parts), none.new_zeros(none.shape[1]))
    return torch.cat([none, *(one.products for one in parts)]), sizes


def _stacked(vectors: Sequence[Sample]) -> Tensor:
    """Vectors (batch, vectors, ...) in float64."""
    stacked = torch.stack([*vectors], 1)
    return (stacked.cpu() if stacked.device.type in NO_FLOAT64 else stacked).double()


def robust_weights(equations: Sequence[NormalEquations], start: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (vectors,) that lead nearest to the aim, from few trajectories, some of which may be odd.

    The energy of an outlier's residual counts no more than CAP medians. Weights are held at `start` by as much as the
    residual says that they are uncertain: PRIOR_WEIGHT times its mean square is added to the normal matrix. So few
    values move them little, and many freely. With them comes what those of each band differ by (vectors, bands); where
    equations have no bands, it is 0.
    """
    every = NormalEquations(torch.cat([one.products for one in equations]), equations[0].sizes)
    counted = torch.ones(len(every.products), dtype=torch.float64)
    noise, weights = 0.0, start
    for _ in range(REWEIGHTINGS):
        products, _ = every.total(counted)
        explained = float(products.sum(0).diagonal()[:-1].mean())
        weights = solved(products, start, LEAST_RIDGE + PRIOR_WEIGHT * noise / explained if explained else LEAST_RIDGE)
        left = every.residuals(weights[:, None])
        counted = (CAP * left.median() / left).clamp(max=1)
        noise = float((counted * left).sum() / counted.sum())
    each, sizes = counted[:, None, None, None] * every.products, every.sizes * counted.sum()
    return weights, solved_apart(each, sizes, weights)


def solved(products: Tensor, start: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weights (vectors,) that lead nearest to the aim by products (bands, vectors + 1, vectors + 1), all together.

    Held at the weights `start` by a ridge, relative to the mean diagonal.
    """
    total = products.sum(0)
    normal, right = total[:-1, :-1], total[:-1, -1]
    held = ridge * normal.diagonal().mean() * torch.eye(len(start), dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(normal + held, right + held @ start)
    return weights


def solved_apart(each: Tensor, sizes: Tensor, together: Tensor, workers: Workers = ALONE) -> Tensor:
    """What the weights of each band differ by (vectors, bands) from those of all bands together; 0 of a single band.

    `each` (trajectories, bands, vectors + 1, vectors + 1) are the products of this worker's trajectories, and `sizes`
    (bands,) the coefficients of all workers'. As few coefficients say little, the weights of a band are held at those
    of all by `ridges`, as strongly as `hold_of` says.
    """
    if len(sizes) == 1:
        return torch.zeros(len(together), 1, dtype=torch.float64)
    products, hold = workers.sum(each.sum(0)), hold_of(each, sizes, together, workers)
    ridge = ridges(products, sizes, together, hold)
    return filled(_apart(products, ridge, together).mT, sizes == 0)


def hold_of(each: Tensor, sizes: Tensor, together: Tensor, workers: Workers = ALONE) -> float:
    """How strongly to hold the weights of bands at those of all: as does best on trajectories that are left out.

    Arguments are those of `solved_apart`. Every trajectory is left out once. How much one tells differs: in one model
    its errors are those of a few decisions, in the next those of a thousand independent values. Of fewer than
    LEAST_LEFT_OUT trajectories it is PRIOR_WEIGHT.
    """
    products = workers.sum(each.sum(0))
    if int(workers.sum(torch.tensor(len(each)))) < LEAST_LEFT_OUT:
        return PRIOR_WEIGHT
    left = torch.zeros(len(HOLDS), dtype=torch.float64)
    for number, hold in enumerate(HOLDS):
        ridge = ridges(products, sizes, together, hold)
        signed = _signed(together + _apart(products - each, ridge, together))
        left[number] = torch.einsum("tbi,tbij,tbj->", signed, each, signed)
    return HOLDS[int(workers.sum(left).argmin())]


def ridges(products: Tensor, sizes: Tensor, together: Tensor, hold: float) -> Tensor:
    """What holds the weights of each band (bands,) at those of all: `hold` times the mean square of what is left.

    `products` (bands, vectors + 1, vectors + 1) and `sizes` (bands,) are of all trajectories.
    """
    count = len(together)
    least = LEAST_RIDGE * products[:, :-1, :-1].diagonal(dim1=1, dim2=2).mean(-1)
    found, apart = least, torch.zeros(len(sizes), count, dtype=torch.float64)
    for _ in range(REWEIGHTINGS):
        signed = _signed(together + apart)
        noise = torch.einsum("bi,bij,bj->b", signed, products, signed) / (sizes - count).clamp(min=1)
        found = hold * noise + least
        apart = _apart(products, found, together)
    return found


def _apart(products: Tensor, ridge: Tensor, together: Tensor) -> Tensor:
    """What the weights of each band differ by (..., bands, vectors), held by its ridge (bands,)."""
    normal, right = products[..., :-1, :-1], products[..., :-1, -1]
    apart: Tensor = torch.linalg.solve(normal + _diagonal(ridge, len(together)), right - normal @ together)
    return apart


def _diagonal(ridge: Tensor, count: int) -> Tensor:
    """Ridges (bands,) as matrices (bands, count, count); that of a band without coefficients is any."""
    return torch.where(ridge > 0, ridge, 1.0)[:, None, None] * torch.eye(count, dtype=torch.float64)


def _signed(weights: Tensor) -> Tensor:
    """Weights (..., vectors) for what is left of the aim, which is subtracted."""
    return torch.cat([weights, -torch.ones_like(weights[..., :1])], -1)


def from_begin(products: Tensor) -> Tensor:
    """Products of vectors v, samples x and the aim t, (..., vectors + 2, vectors + 2), as those of v and t - x."""
    way = torch.eye(products.shape[-1], dtype=torch.float64)[[*range(products.shape[-1] - 2), -1]]
    way[-1, -2] = -1
    return way @ products @ way.T


def with_energy(products: Tensor, sizes: Tensor, together: Tensor, hold: float) -> Tensor:
    """What bands differ by (vectors, bands), held by `hold`, but that samples have the aim's energy in every band.

    `products` (bands, vectors + 2, vectors + 2) are of vectors v, of samples x that their sum is added to, and of the
    aim t. Weights w minimise |x + w v - g t|^2 with the gain g for which |x + w v| = |t|: least squares with the energy
    as a side condition, by Lagrange's multiplier. Least squares alone, g = 1, aims at the mean of what may follow,
    which has less energy than any of it. That stays where the vectors cannot reach the energy with a usual gain.
    """
    apart, count = torch.zeros(len(together), len(sizes), dtype=torch.float64), len(together)
    every = products[:, :count, :count] + _diagonal(ridges(from_begin(products), sizes, together, hold), count)
    for n in sizes.nonzero().flatten().tolist():
        own, target, held = products[n, :-1, :-1], products[n, -1, -1], every[n]
        normal = own[:-1, :-1]
        right = torch.stack([-own[:-1, -1] - normal @ together, products[n, :-2, -1]], 1)
        still, per_gain = torch.linalg.solve(held, right).unbind(1)  # the weights are affine in the gain,
        begin = torch.cat([together + still, torch.ones(1, dtype=torch.float64)])
        more = torch.cat([per_gain, torch.zeros(1, dtype=torch.float64)])
        square, mixed, rest = (
            more @ own @ more,
            begin @ own @ more,
            begin @ own @ begin - target,
        )  # the energy quadratic
        gain = float((((mixed**2 - square * rest).sqrt() - mixed) / square).nan_to_num(nan=1.0))
        apart[:, n] = still + (gain if GAINS[0] < gain < GAINS[1] else 1.0) * per_gain
    return filled(apart, sizes == 0)


@dataclass
class Walk:
    """A batch on its way along a teacher's path."""

    denoiser: Denoiser
    x: Sample  # noisy, at the table's first level
    path: TeacherPath
    history: History = ()  # may begin with the first evaluation, if that is known

    def equations(self, table: MultistepTable, k: int) -> NormalEquations:
        """Of interval k, whose slope it evaluates: from where it stands back to the path."""
        if len(self.history) == k:
            planner = table.method().planner
            x, sigma = planner.carried(k, self.x, torch.tensor(table.config.sigmas[k]).to(self.x))
            self.history = (*self.history, asked(self.denoiser, planner, k, x, sigma))
        return equations_of(self.history, self.path, table, k)

    def go(self, table: MultistepTable, k: int) -> None:
        """Cross interval k with the table's weights."""
        method = table.method()
        to = torch.tensor(table.config.sigmas[k + 1]).to(self.x)
        self.x = method.solver.to_next(self.history, to, None, method.stages[k])


def equations_of(history: History, path: TeacherPath, table: MultistepTable, k: int) -> NormalEquations:
    """Of interval k of a table, from the evaluations (batch, ...) up to it: back to the path."""
    config, start, sigma_next = table.config, history[k], table.config.sigmas[k + 1]
    aim = (path.at(sigma_next)[0].to(start.x) - start.x) / (sigma_next - float(start.sigma))
    return NormalEquations.of(vectors_of(table, history, k), aim, spectral=config.spectral)


def vectors_of(table: MultistepTable, history: History, k: int) -> list[Sample]:
    """What interval k of a table adds up, each (batch, ...), of evaluations (batch, ...) from the first call on."""
    begin = table.known(k).start
    return multistep_vectors(history[begin : k + 1], [j - begin for j in table.asking(k)])


@torch.no_grad()
def along(table: MultistepTable, passed: TeacherPath) -> tuple[MultistepTable, list[NormalEquations]]:
    """The table with weights from a teacher's own path, at no call, and the equations of every interval there.

    They are robust, and held at those of `table`, which is unguided and not spectral.
    """
    every: list[list[NormalEquations]] = []
    for piece in passed.pieces():
        history: History = ()
        every.append([])
        for k, sigma in enumerate(table.asked[:-1]):
            x, slope = piece.at(sigma)
            history = (*history, Evaluation(x, torch.tensor(sigma, dtype=x.dtype), x - sigma * slope))
            every[-1].append(equations_of(history, piece, table, k))
    made = MultistepTable(table.config)
    made.load_state_dict(table.state_dict())
    listed = [sum_of_parts(of_pieces) for of_pieces in zip(*every, strict=True)]
    for k, one in enumerate(listed):
        made.set_row(k, robust_weights([one], table.row(k))[0])
    return made, listed


def cost_on_paper(table: MultistepTable, equations: Sequence[NormalEquations], passed: TeacherPath) -> float:
    """What a table's errors of all intervals leave at the end, squared, per value, if none met another.

    `equations` are those of every interval along the path. A first step without a call errs, too.
    """
    left: list[float] = left_of_errors(
        table.asked, float(passed.end.double().square().mean()), table.config.flow
    ).tolist()
    made = [float(one.residuals(table.row_by_band(k)).mean()) for k, one in enumerate(equations)]
    steps = [sigma - sigma_next for sigma, sigma_next in pairwise(table.asked)]
    cost = sum(part * step**2 * error for part, step, error in zip(left[1:], steps, made, strict=True))
    return cost + left[0] * _missed_at_first(table, passed) if table.config.first_sigma else cost


def _missed_at_first(table: MultistepTable, passed: TeacherPath) -> float:
    """How far from a path a first step without a call leads: the mean square of all values."""
    begin, end = table.config.sigmas[0], table.config.first_sigma
    total = 0.0
    for channel, one in enumerate(passed.channels()):
        x = carried(one.at(begin)[0], table.gains[channel : channel + 1])
        total += float(squares(x, one.at(end)[0]).mean())
    return total / len(table.gains)


@torch.no_grad()
def least_squares(
    table: MultistepTable, walks: Sequence[Walk], workers: Workers = ALONE, ridge: float = RIDGE
) -> MultistepTable:
    """The table with the weights that lead nearest to the teacher at every level, from where they led before.

    Minimises |x + (sigma_next - sigma) (sum_j w_j slope_j + v denoised_0 + sum_j u_j guidance_slope_j)
    - teacher(sigma_next)|^2 + ridge |w - w_0|^2, with w_0 the weights of `table`; u is there if it is guided. A
    spectral table then takes the weights of every band in the same way, held at those of all. Takes one run of each
    walk, and leaves it where that ends.
    """
    config, made = table.config, MultistepTable(table.config)
    made.load_state_dict(table.state_dict())
    for k in range(config.intervals):
        each, sizes = joined([walk.equations(made, k) for walk in walks], config.spectral, len(table.row(k)) + 1)
        row = solved(workers.sum(each.sum(0)), table.row(k), ridge)
        made.set_row(k, row, solved_apart(each, workers.sum(sizes), row, workers) if config.spectral else None)
        for walk in walks:
            walk.go(made, k)
    return made
