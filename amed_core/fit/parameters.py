"""The numbers of a multistep table that are moved end to end, as one vector for each guidance scale."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..multistep import MultistepTable, known_to

Kind = Literal["weight", "guided", "first", "scale_time"]
NEWEST = {"weight": 4, "guided": 2}  # slopes whose weights are moved end to end; in the last interval all, at no call


@dataclass(frozen=True)
class Number:
    """One number of a table: what it is, and which interval it acts in."""

    kind: Kind
    interval: int
    slope: int = 0  # of a weight, also of one of guidance


def layout(intervals: int, *, guided: bool, switch: int = 0) -> list[Number]:
    """The numbers of a table at one guidance scale, but for its first step's gains, which stay as they are."""
    triangles: tuple[Kind, ...] = ("weight", "guided") if guided else ("weight",)
    vectors: tuple[Kind, ...] = ("first", "scale_time")
    weights = [
        Number(kind, k, slope)
        for kind in triangles
        for k in range(intervals)
        for slope in known_to(k, switch)[0 if k == intervals - 1 else -NEWEST[kind] :]
    ]
    return weights + [Number(kind, k) for kind in vectors for k in range(intervals)]


def numbers_of(table: MultistepTable) -> Tensor:
    """The numbers (guidances, count) in the layout's order, of scale_time the logarithm, in float64."""
    places = _places(table)
    return torch.cat([values.cpu().double()[:, where] for values, where in zip(_values(table), places, strict=True)], 1)


def table_of(like: MultistepTable, numbers: Tensor) -> MultistepTable:
    """The inverse: a table of the same settings and first step, with these numbers."""
    table = MultistepTable(like.config)
    table.load_state_dict(like.state_dict())
    begin = 0
    for values, where in zip(_values(table), _places(table), strict=True):
        values[:, where] = numbers[:, begin : begin + len(where)].to(values)
        begin += len(where)
    table.scale_time.copy_(values.exp().reshape(table.scale_time.shape))
    return table


def _values(table: MultistepTable) -> list[Tensor]:
    """What its numbers are kept in, a row for each guidance scale; the last is a copy, the logarithm of scale_time."""
    n = table.config.intervals
    kept = [table.weights, *([table.guided] if table.config.guided else [])]
    rows = [values.view(-1, n * n) for values in kept]
    return [*rows, table.first.view(-1, n), table.scale_time.log().reshape(-1, n)]


def _places(table: MultistepTable) -> list[list[int]]:
    """Where in those rows the layout's numbers are."""
    config, n = table.config, table.config.intervals
    numbers = layout(n, guided=config.guided, switch=config.switch)
    kinds = dict.fromkeys(number.kind for number in numbers)
    return [
        [number.interval * (n if kind in NEWEST else 1) + number.slope for number in numbers if number.kind == kind]
        for kind in kinds
    ]
