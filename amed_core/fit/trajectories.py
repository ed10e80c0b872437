"""Where trajectories start, and the model calls along them: drawn per trajectory, counted, split if memory is short."""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..driver import conditional, in_full
from ..types import Answer, Denoiser, Sample, Sigma, Source

HELD_OUT = 2**40  # trajectories from this number on are never fitted


def noise(rows: Sequence[int], shape: tuple[int, ...], seed: int) -> Sample:
    """Unit noise (rows, *shape) on the CPU, every trajectory's from its own number.

    So it is the same on every device, in whatever batches the trajectories run, and on whichever worker.
    """

    def one(row: int) -> Tensor:
        drawn = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(drawn[0])))

    return torch.stack([one(row) for row in rows])


def gaussian(
    denoiser: Denoiser, shape: tuple[int, ...], sigma: float, seed: int = 0, device: torch.device | str = "cpu"
) -> Source:
    """A source of noise sigma * N(0, 1) for samples of `shape`.

    A denoiser with `for_rows(rows)` is asked for the one that is conditioned for these trajectories.
    """

    def draw(rows: range) -> tuple[Sample, Denoiser]:
        return sigma * noise(rows, shape, seed).to(device), conditioned(denoiser, rows)

    return draw


class Metered:
    """A source whose model calls are counted, and split where memory runs out.

    A call that does not fit is made again in halves, and so is every later one of its size; the
    answers are the same to rounding. A model that takes one sample at a time is given one.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.calls = 0  # single-sample model calls,
        self.passes = 0  # and passes of the network in them: two where both answers of a guided model are shown
        self.most: int | None = None  # samples that fit into memory at once; None: it was never short
        self.earlier_not_finite = 0  # of a state
        self._not_finite: Tensor | int = 0  # counted where the answers are, so that no call waits for a GPU

    def __call__(self, rows: range) -> tuple[Sample, Denoiser]:
        x, denoiser = self.source(rows)
        return x, MeteredDenoiser(self, rows, denoiser)

    @property
    def not_finite(self) -> int:
        """The samples so far to which the model answered NaN or infinity, though they were finite."""
        return self.earlier_not_finite + int(self._not_finite)

    def count(self, x: Sample, answer: Answer) -> None:
        """Count one call of the model for samples x (batch, ...)."""
        denoised, _, guidance = in_full(answer)
        self.calls += len(x)
        self.passes += len(x) * (1 if guidance is None else 2)
        with torch.no_grad():
            faults = _finite(x) & ~_finite(denoised)
        self._not_finite = self._not_finite + faults.sum()


class MeteredDenoiser:
    """The denoiser of some trajectories, with its calls counted."""

    def __init__(self, meter: Metered, rows: range, denoiser: Denoiser) -> None:
        self.meter = meter
        self.rows = rows
        self.denoiser = denoiser

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        return self._answered(x, sigma, lambda denoiser: denoiser)

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance. Raises ValueError if the denoiser has none."""
        return self._answered(x, sigma, conditional)

    def _answered(self, x: Sample, sigma: Sigma, way: Callable[[Denoiser], Denoiser]) -> Answer:
        """What the denoiser answers when it is asked in this way."""
        count = len(x)
        while True:
            size = min(self.meter.most or count, count)
            parts = [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
            try:
                answers = [in_full(way(self._for(part, count))(x[part], _part_of(sigma, part))) for part in parts]
            except (RuntimeError, ValueError) as error:
                alone = one_at_a_time(error)
                if size == 1 or not (alone or out_of_memory(error)):
                    raise
            else:
                denoised, features, guidance = (_join(values) for values in zip(*answers, strict=True))
                assert denoised is not None
                self.meter.count(x, (denoised, features, guidance))
                return denoised, features, guidance
            # Outside of the handler, where the failed call's tensors are gone.
            self.meter.most = 1 if alone else -(-size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _for(self, part: slice, count: int) -> Denoiser:
        """The denoiser conditioned for a part of its trajectories."""
        if part.stop - part.start == count:
            return self.denoiser
        return self.meter.source(self.rows[part])[1]


def one_at_a_time(error: Exception) -> bool:
    """Whether a model says that it takes no batches: there are some that ComfyUI asks about one sample at a time."""
    return re.search(r"batch size 1\b", str(error).lower()) is not None


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left: CUDA has its own error, others only say so."""
    words = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in words or "allocate memory" in words


def _finite(samples: Sample) -> Tensor:
    """Which samples (rows,) of x (rows, ...) are finite."""
    return samples.isfinite().flatten(1).all(1)


def _part_of(sigma: Sigma, part: slice) -> Sigma:
    return sigma if sigma.ndim == 0 or sigma.shape[0] == 1 else sigma[part]


def _join(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [v for v in values if v is not None]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


def chunks(n: int, batch: int) -> Iterator[range]:
    """Row numbers 0 to n - 1 in pieces of at most `batch`."""
    return (range(start, min(start + batch, n)) for start in range(0, n, batch))


def conditioned(denoiser: Denoiser, rows: Sequence[int]) -> Denoiser:
    """The denoiser as samples number `rows` ask for it, if it has conditions (`for_rows`); else itself."""
    bound: Denoiser = getattr(denoiser, "for_rows", lambda _: denoiser)(rows)
    return bound
