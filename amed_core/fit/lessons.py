"""What students on one grid have seen, from which weights follow for them again and again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..multistep import MultistepTable
from ..spectrum import BANDS
from ..types import History
from .closed_form import NormalEquations, Walk, robust_weights
from .protocol import StateError
from .reading import of_finite, of_squares
from .teacher import TeacherPath


@dataclass(frozen=True)
class Learns:
    """What a student learns beside weights of slopes: those of guidance slopes, and of each band apart."""

    guided: bool = False
    spectral: bool = False


NOTHING_APART = Learns()


@dataclass(frozen=True)
class Lessons:
    """What students on one grid added up, and where a teacher went from the same noise, as inner products.

    From them the equations of every interval follow for any weights of those before it, as if slopes stayed as they
    were: where weights change, a student stands elsewhere, and has another way back to the path. Points are written as
    shares (bands, vectors) of the noisy sample, n slopes, n guidance slopes if there are any, and the path at n levels.
    """

    levels: tuple[float, ...]  # n + 1, of the grid
    learns: Learns
    products: Tensor  # (trajectories, bands, vectors, vectors), in float64 on the CPU
    sizes: Tensor  # (bands,), coefficients of a trajectory in each

    @classmethod
    def none(cls, table: MultistepTable) -> "Lessons":
        """Of no student of a table yet, which asks for guidance at every call or at none."""
        levels, config = table.asked, table.config
        count = 1 + (2 + config.guided) * (len(levels) - 1)
        apart = BANDS if config.spectral else 1
        sizes = torch.zeros(apart, dtype=torch.float64)
        products = torch.zeros(0, apart, count, count, dtype=torch.float64)
        return cls(tuple(levels), Learns(config.guided, config.spectral), products, sizes)

    @classmethod
    def of(cls, table: MultistepTable, products: Any, sizes: Any) -> "Lessons":
        """Those of a state, for a table. Raises TypeError or ValueError, a StateError among them, if they are none."""
        none = cls.none(table)
        shape = (len(products), *none.products.shape[1:])
        made = replace(none, products=of_squares(products, shape), sizes=of_finite(sizes, none.sizes.shape).double())
        if not (len(products) and made.sizes.min() >= 0 and made.sizes.sum() > 0):
            raise StateError("This state of learning is damaged: it holds a lesson of no picture.")
        return made

    def and_of(self, history: History, passed: TeacherPath) -> "Lessons":
        """With those of more students, from what they evaluated (batch, ...) at all levels but the last."""
        x = history[0].x
        path = [passed.at(sigma)[0].to(x) for sigma in self.levels[1:]]
        slopes = [*(one.slope for one in history), *(one.guidance_slope for one in history if self.learns.guided)]
        more = NormalEquations.of([x, *slopes, *path[:-1]], path[-1], spectral=self.learns.spectral)
        return replace(self, products=torch.cat([self.products, more.products]), sizes=more.sizes)

    def of_size(self, size: int) -> "Lessons":
        """As if trajectories had so many values."""
        times = size / float(self.sizes.sum())
        return replace(self, products=self.products * times, sizes=self.sizes * times)

    @property
    def begin(self) -> Tensor:
        """Where students begin."""
        return self._share(0).expand(len(self.sizes), -1)

    def equations(self, table: MultistepTable, k: int, stood: Sequence[Tensor]) -> NormalEquations:
        """Of interval k, for students who stood at these points where the intervals up to it begin."""
        path = self._share(self.products.shape[-1] - len(self.levels) + 1 + k)
        aim = (path - stood[k]) / (self.levels[k + 1] - self.levels[k])
        rows = torch.cat([self._added(table, k, stood), aim[:, None]], 1)
        return NormalEquations(torch.einsum("biv,tbvw,bjw->tbij", rows, self.products, rows), self.sizes)

    def after(self, table: MultistepTable, k: int, stood: Sequence[Tensor]) -> Tensor:
        """Where the table's interval k leads such students."""
        slope = torch.einsum("ib,biv->bv", table.row_by_band(k)[:, : len(self.sizes)], self._added(table, k, stood))
        return stood[k] + (self.levels[k + 1] - self.levels[k]) * slope

    def _added(self, table: MultistepTable, k: int, stood: Sequence[Tensor]) -> Tensor:
        """What interval k adds up (bands, vectors of the interval, vectors), in the order of `multistep_vectors`."""
        known, n = table.known(k), len(self.levels) - 1
        denoised = stood[known.start] - self.levels[known.start] * self._share(1 + known.start)
        slopes, guidance = ([self._share(at + j).expand_as(denoised) for j in known] for at in (1, 1 + n))
        return torch.stack([*slopes, denoised, *(guidance if self.learns.guided else [])], 1)

    def _share(self, number: int) -> Tensor:
        return torch.eye(self.products.shape[-1], dtype=torch.float64)[number]


@torch.no_grad()
def taught(
    table: MultistepTable, lessons: Lessons, walk: Walk | None = None
) -> tuple[MultistepTable, list[NormalEquations]]:
    """A table with weights from lessons, and from a batch that walks with them; and the equations of that batch.

    Interval by interval, robustly, and held at the weights of `table`, which learns what the lessons tell of. Without
    a batch it takes no call, and the equations are those of the lessons.
    """
    made, stood, listed = MultistepTable(table.config), [lessons.begin], []
    made.load_state_dict(table.state_dict())
    for k in range(table.config.intervals):
        known = [lessons.equations(made, k, stood)]
        if walk is not None:
            known.insert(0, walk.equations(made, k))
        row, apart = robust_weights(known, table.row(k))
        made.set_row(k, row, apart if table.config.spectral else None)
        stood.append(lessons.after(made, k, stood))
        listed.append(known[0])
        if walk is not None:
            walk.go(made, k)
    return made, listed
