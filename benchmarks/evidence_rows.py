"""The rows that evidence.py leaves of the text-to-picture model, and their tables in Markdown.

Needs neither ComfyUI nor torch.
"""

import json
import math
import runpy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STOCK, USED, OURS, LEARNED, PAPER, APART, LADDER, CHECK = KINDS = (
    "stock", "used", "ours", "learned", "published", "CFG++", "ladder", "check",
)  # fmt: skip
GOAL_CALLS, GOAL_RATIO, GOAL_WORST, GOAL_SHARP, GOAL_VARIETY, GOAL_STOCK_CALLS = 5, 0.5, 0.8, 0.03, 0.02, 12
LATENT, DECODED = SPACES = ("latent", "decoded")
LOOKS = ("sharp", "variety", "saturation", "contrast")
DEFAULT = "default"  # the fit with nothing chosen
EQUIVALENT = Path(__file__).parents[1] / "amed_core" / "fit" / "equivalent.py"
calls_on = runpy.run_path(str(EQUIVALENT))["calls_on"]  # by its path, as the package imports torch


@dataclass(frozen=True)
class Spread:
    """The errors of all seeds."""

    rmse: float
    low: float  # its 95 % interval, by bootstrap over prompts
    high: float
    mean: float
    median: float
    p90: float
    worst: float


@dataclass(frozen=True)
class Versus:
    """A method against the best stock pair of its cell, on the same seeds."""

    other: str
    ratio: float  # of RMSEs
    low: float
    high: float
    won: float  # the share of seeds that are nearer to the teacher
    p: float  # of the sign test


@dataclass
class Row:
    """One method at a scale of guidance and a number of model calls."""

    cfg: float
    calls: int  # counted
    passes: float  # of the network, for one picture; counted
    kind: str
    name: str
    draw: int | None  # which fit or which pictures, where that is drawn
    samples: int
    seconds: float  # to draw them
    latent: Spread
    decoded: Spread
    few: tuple[float, float, float, float]  # latent RMSE and median, decoded RMSE and median of the ladder's seeds
    ssim: float  # means over pictures
    flip: float
    bands: list[float]  # power over the teacher's, in every half octave
    sharp: float  # in the two finest together
    variety: float  # over the teacher's
    saturation: float
    contrast: float
    latent_versus: Versus | None = None
    decoded_versus: Versus | None = None
    fit_calls: int | None = None
    fit_seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it another row."""
        return self.cfg, self.calls, self.kind, self.name, self.draw

    def text(self) -> str:
        """In one line, as it is measured."""
        draw = "" if self.draw is None else f" ({self.draw})"
        said = "" if self.decoded_versus is None else f", {self.decoded_versus.ratio:.2f} of stock's"
        return (
            f"cfg {self.cfg:g}, {self.calls} calls, {self.passes:g} passes | {self.kind}: {self.name}{draw} | decoded "
            f"{self.decoded.rmse:.4f} (median {self.decoded.median:.4f}){said} | latent {self.latent.rmse:.4f} "
            f"({self.latent.median:.4f}) | SSIM {self.ssim:.3f}, FLIP {self.flip:.3f}, sharp {self.sharp:.3f}, variety "
            f"{self.variety:.3f}, saturation {self.saturation:.3f}, contrast {self.contrast:.3f} | {self.seconds:.0f} s"
        )


def load(file: Path) -> list[Row]:
    """The rows of a file that evidence.py wrote."""
    return [_row(row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def _row(kept: dict[str, Any]) -> Row:
    spreads = {name: Spread(**kept[name]) for name in SPACES}
    versus = {n: Versus(**kept[n]) if kept[n] else None for n in ("latent_versus", "decoded_versus")}
    return Row(**kept | spreads | versus | {"few": tuple(kept["few"])})


def best_stock(rows: Iterable[Row], cfg: float, calls: int, space: str = DECODED) -> Row | None:
    """The stock pair with the least error of a cell."""
    some = [row for row in rows if (row.cfg, row.calls, row.kind) == (cfg, calls, STOCK)]
    return min(some, key=lambda row: float(getattr(row, space).rmse), default=None)


def same_error(error: float, ladder: Sequence[tuple[int, float]]) -> str:
    """How many calls the best stock pairs take for this error, as a text: "12.3", "below 3" or "over 24".

    The ladder has errors by calls, and is read as in `calls_on`.
    """
    calls = [calls for calls, _ in sorted(ladder)]
    found = calls_on(ladder, error)
    if found == 0:
        return f"below {calls[0]}"
    if math.isinf(found):
        return f"over {calls[-1]}"
    return f"{calls[0]}" if found == calls[0] else f"{found:.1f}"


def groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of the same method, whatever was drawn."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key[:-1], []).append(row)
    return found


def _line(cell: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cell))} |"


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, lines)])


def _order(row: Row) -> tuple[Any, ...]:
    name = row.name if row.kind in (OURS, LEARNED) else ""
    return row.cfg, row.calls, KINDS.index(row.kind), name, row.decoded.rmse


def _mean(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    return statistics.fmean(of(row) for row in rows)


def _methods(rows: Sequence[Row]) -> list[list[Row]]:
    """What the main tables have: of stock only the best pair of each cell, and no rungs."""
    left = [row for row in rows if row.kind not in (STOCK, LADDER, CHECK)]
    cells = dict.fromkeys((row.cfg, row.calls) for row in rows if row.kind == STOCK)
    left += [row for cell in cells if (row := best_stock(rows, *cell)) is not None]
    return list(groups(sorted(left, key=_order)).values())


def _named(rows: Sequence[Row]) -> list[object]:
    one = rows[0]
    name = {STOCK: f"{one.name} (best stock)", OURS: f"**ours, {one.name}**", LEARNED: f"**ours, {one.name}**"}
    draws = f", {len(rows)} draws" if len(rows) > 1 else ""
    return [f"{one.cfg:g}", one.calls, f"{one.passes:g}", name.get(one.kind, one.name) + draws]


def errors(rows: Sequence[Row]) -> str:
    """Latent and decoded errors of every method, in Markdown; means over draws."""
    head = [
        "cfg", "Calls", "Passes", "Method", "Decoded error (95 %)", "mean, median, 90 %, worst",
        "of the best stock pair's (95 %)", "Seeds won", "Sign test", "Latent error", "mean, median, 90 %, worst",
        "of stock's", "SSIM", "FLIP",
    ]  # fmt: skip

    def spread(some: Sequence[Row], of: Callable[[Row], Spread]) -> list[str]:
        each = [of(row) for row in some]
        rmse, low, high = (statistics.fmean(getattr(e, n) for e in each) for n in ("rmse", "low", "high"))
        names = ("mean", "median", "p90", "worst")
        rest = ", ".join(f"{statistics.fmean(getattr(e, n) for e in each):.4f}" for n in names)
        return [f"{rmse:.4f} ({low:.4f} to {high:.4f})", rest]

    def versus(some: Sequence[Row]) -> list[str]:
        each = [row.decoded_versus for row in some if row.decoded_versus]
        if not each:
            return ["", "", ""]
        ratio, low, high, won = (statistics.fmean(getattr(e, n) for e in each) for n in ("ratio", "low", "high", "won"))
        return [f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{won:.0%}", f"{max(e.p for e in each):.1g}"]

    def line(some: list[Row]) -> list[object]:
        latent = [row.latent_versus.ratio for row in some if row.latent_versus]
        of_stock = f"{statistics.fmean(latent):.2f}" if latent else ""
        likeness = [f"{_mean(some, lambda r: r.ssim):.3f}", f"{_mean(some, lambda r: r.flip):.3f}"]
        decoded, far = spread(some, lambda r: r.decoded), spread(some, lambda r: r.latent)
        return [*_named(some), *decoded, *versus(some), *far, of_stock, *likeness]

    return _table(head, map(line, _methods(rows)))


def looks(rows: Sequence[Row]) -> str:
    """Sharpness, variety and colour of every method over the teacher's, in Markdown; means over draws."""
    head = [
        "cfg", "Calls", "Passes", "Method", "Power in the two finest bands", "Power by half octave, fine to coarse",
        "Variety", "Saturation", "Contrast",
    ]  # fmt: skip

    def line(some: list[Row]) -> list[object]:
        bands = zip(*(reversed(row.bands) for row in some), strict=True)
        means = ", ".join(f"{mean:.2f}" for band in bands if math.isfinite(mean := statistics.fmean(band)))
        sharp, *rest = (f"{_mean(some, lambda r, n=name: getattr(r, n)):.3f}" for name in LOOKS)
        return [*_named(some), sharp, means, *rest]

    return _table(head, map(line, _methods(rows)))


def equivalents(rows: Sequence[Row]) -> str:
    """How many calls the best stock pairs take for the error of ours, in Markdown."""
    head = ["cfg", "Calls", "Ours", "Stock calls for its decoded error", "for its median", "latent", "latent median"]
    lines: list[list[object]] = []
    for some in groups(sorted(rows, key=_order)).values():
        one = some[0]
        rungs = [row for row in rows if row.kind == LADDER and row.cfg == one.cfg]
        if one.kind not in (OURS, LEARNED) or not rungs:
            continue
        cells = []
        for place in (2, 3, 0, 1):
            ladder = [(row.calls, row.few[place]) for row in rungs]
            cells.append(same_error(_mean(some, lambda r, n=place: r.few[n]), ladder))
        lines.append([f"{one.cfg:g}", one.calls, one.name, *cells])
    return _table(head, lines)


def rungs(rows: Sequence[Row]) -> str:
    """The best stock pair of every number of calls, in Markdown."""
    head = ["cfg", "Calls", "Passes", "Best stock pair", "Decoded error, median", "Latent error, median"]
    some = sorted((row for row in rows if row.kind == LADDER), key=_order)

    def line(row: Row) -> list[object]:
        rmse, median, decoded, decoded_median = (f"{value:.4f}" for value in row.few)
        calls = [f"{row.cfg:g}", row.calls, f"{row.passes:g}"]
        return [*calls, row.name, f"{decoded}, {decoded_median}", f"{rmse}, {median}"]

    return _table(head, map(line, some))


def teachers(rows: Sequence[Row]) -> str:
    """How far the teacher is from itself in many more calls, in Markdown."""
    head = ["cfg", "Against", "Samples", "Decoded error, median, worst", "Latent error, median, worst"]
    lines = []
    for row in sorted((row for row in rows if row.kind == CHECK), key=_order):
        far = [f"{e.rmse:.4f}, {e.median:.4f}, {e.worst:.4f}" for e in (row.decoded, row.latent)]
        lines.append([f"{row.cfg:g}", row.name, row.samples, *far])
    return _table(head, lines)


def goals(rows: Sequence[Row]) -> str:
    """Whether the goals are reached, by every method of ours, in Markdown."""
    head = [
        "Ours", f"Cells of {GOAL_CALLS} calls", f"Decoded ratio, median (at most {GOAL_RATIO:g})",
        f"largest (at most {GOAL_WORST:g})", f"Sharpness, farthest (within {GOAL_SHARP:.0%})",
        f"Variety, farthest (within {GOAL_VARIETY:.0%})", f"Stock calls for its error (at least {GOAL_STOCK_CALLS})",
        "for its median",
    ]  # fmt: skip
    lines: list[list[object]] = []
    own = [
        r for r in sorted(rows, key=_order) if r.kind in (OURS, LEARNED) and r.calls == GOAL_CALLS and r.decoded_versus
    ]
    for name in dict.fromkeys(row.name for row in own):
        cells = list(groups([row for row in own if row.name == name]).values())
        ratios = [_mean(cell, lambda r: r.decoded_versus.ratio if r.decoded_versus else math.nan) for cell in cells]
        sharp = max((_mean(cell, lambda r: r.sharp) for cell in cells), key=lambda value: abs(value - 1))
        various = max((_mean(cell, lambda r: r.variety) for cell in cells), key=lambda value: abs(value - 1))
        calls = []
        for place in (2, 3):
            found = []
            for cell in cells:
                ladder = [(r.calls, r.few[place]) for r in rows if r.kind == LADDER and r.cfg == cell[0].cfg]
                if ladder:
                    found.append(same_error(_mean(cell, lambda r, n=place: r.few[n]), ladder))
            calls.append(", ".join(found))
        lines.append(
            [name, len(cells), f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}", f"{sharp:.3f}",
             f"{various:.3f}", *calls]
        )  # fmt: skip
    return _table(head, lines)


PRICES = {  # of the README's table: what it is called there, and its sample calls
    "learned from 1": ("the first picture", 150), "learned from 8": ("the first 15 pictures, of which 8 teach", 700),
    "quick": ("`effort: quick`", 250), "standard": ("`effort: standard`", 2500),
    "thorough": ("`effort: thorough`", 40_000),
}  # fmt: skip
USUAL_STEPS = 20  # of a picture whose calls are a price


def prices(rows: Sequence[Row]) -> str:
    """What each way to learn costs, and its decoded error over the best stock pair's, means over draws, by scale."""
    found = groups(rows)
    scales = sorted({row.cfg for row in rows if row.calls == GOAL_CALLS})
    lines: list[list[object]] = []
    for name, (shown, calls) in PRICES.items():
        line: list[object] = [shown, f"{calls:,}", f"{calls / USUAL_STEPS:,.0f}"]
        for cfg in scales:
            some = found.get((cfg, GOAL_CALLS, OURS, name)) or found.get((cfg, GOAL_CALLS, LEARNED, name)) or []
            each = [row.decoded_versus for row in some if row.decoded_versus]
            line.append(f"{statistics.fmean(e.ratio for e in each):.2f}" if each else "")
        lines.append(line)
    head = ["", "Model calls, at most about", f"In pictures of {USUAL_STEPS} steps"]
    return _table([*head, *(f"Error, cfg {cfg:g}" for cfg in scales)], lines)


def cells(rows: Sequence[Row]) -> str:
    """A line for each scale of guidance and number of calls: decoded errors of ours over the best stock pair's."""
    names = list(dict.fromkeys(row.name for row in sorted(rows, key=_order) if row.kind in (OURS, LEARNED)))
    head = ["cfg", "Calls", "Passes", "Best stock pair", "Its decoded error, least median", *names]
    found = groups(sorted(rows, key=_order))
    lines: list[list[object]] = []
    for cfg, calls in dict.fromkeys((row.cfg, row.calls) for row in sorted(rows, key=_order) if row.kind == STOCK):
        stock = best_stock(rows, cfg, calls)
        assert stock is not None
        least = min(r.decoded.median for r in rows if (r.cfg, r.calls, r.kind) == (cfg, calls, STOCK))
        line: list[object] = [f"{cfg:g}", calls, f"{stock.passes:g}", stock.name]
        line.append(f"{stock.decoded.rmse:.4f}, {least:.4f}")
        for name in names:
            some = found.get((cfg, calls, OURS, name)) or found.get((cfg, calls, LEARNED, name)) or []
            line.append(_ratios(some, least))
        lines.append(line)
    return _table(head, lines)


def _ratios(some: Sequence[Row], least: float) -> str:
    """The ratio of RMSEs, that of medians to the least of a stock pair, and the seeds won; means over draws."""
    each = [row.decoded_versus for row in some if row.decoded_versus]
    if not each:
        return ""
    ratio, won = statistics.fmean(e.ratio for e in each), statistics.fmean(e.won for e in each)
    median = _mean(some, lambda row: row.decoded.median) / least
    return f"{ratio:.2f}, {median:.2f}, {won:.0%}"


def beside(rows: Sequence[Row]) -> str:
    """A line for each cell: how the best stock pair and ours look beside the teacher."""
    methods = [some for some in _methods(rows) if some[0].kind in (STOCK, OURS, LEARNED)]
    head = ["cfg", "Calls", "Method", "SSIM", "FLIP", "Sharpness", "Variety", "Saturation", "Contrast"]

    def line(some: list[Row]) -> list[object]:
        name = {STOCK: "best stock"}.get(some[0].kind, some[0].name)
        values = (_mean(some, lambda r, n=n: getattr(r, n)) for n in ("ssim", "flip", *LOOKS))
        return [f"{some[0].cfg:g}", some[0].calls, name, *(f"{value:.3f}" for value in values)]

    return _table(head, map(line, methods))


def tables(rows: Sequence[Row]) -> str:
    """All of them, with their headings."""
    parts = {
        "Goals": goals, "Cells": cells, "Errors": errors, "Looks": looks, "Stock calls for the same error": equivalents,
        "The stock pairs of that": rungs, "The teacher": teachers,
    }  # fmt: skip
    return "\n\n".join(f"{name}\n\n{made(rows)}" for name, made in parts.items())
