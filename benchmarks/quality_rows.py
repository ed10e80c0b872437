"""One sampler at one number of calls, as the files of comfyui_quality.py have it, and their tables in Markdown.

Needs neither ComfyUI nor torch.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One sampler at one number of calls."""

    model: str
    cfg: float
    calls: int
    sampler: str
    scheduler: str
    error: float
    low: float
    high: float
    median: float
    p90: float
    frechet: float | None
    samples: int
    seconds: float
    seed: int | None = None  # of the fit
    fit_calls: int | None = None
    fit_seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether it solves another equation, and is measured by that one's end."""
        return bool(self.notes.get("other equation"))


def load(file: Path) -> list[Row]:
    """The rows of a file that comfyui_quality.py wrote."""
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def frechet(rows: list[Row]) -> float:
    """The mean of some fits."""
    return sum(row.frechet or 0.0 for row in rows) / len(rows)


def cells(rows: list[Row]) -> str:
    """The goals' table, and for every model the best pairs, in Markdown."""
    lines = [
        "| Model | cfg | Calls | Best stock pair | Error (95 %) | amed_multistep, every fit | Ratio | Medians "
        "(stock, ours) | Frechet: teacher, stock, ours | Fit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cfg, calls in dict.fromkeys((r.model, r.cfg, r.calls) for r in rows if r.seed is None and r.scheduler):
        some = [r for r in rows if (r.model, r.cfg, r.calls) == (name, cfg, calls)]
        best = min((r for r in some if r.seed is None and not r.apart), key=lambda r: r.error)
        ours = [r for r in some if r.sampler == "amed_multistep"]
        (teacher,) = [r for r in rows if (r.model, r.cfg, r.sampler) == (name, cfg, "teacher")]
        if not ours:
            continue
        mean = sum(r.error for r in ours) / len(ours)
        shown = ", ".join(f"{r.error:.4f}" for r in ours)
        low, high = min(r.low for r in ours), max(r.high for r in ours)
        distances = "" if teacher.frechet is None else f"{teacher.frechet:.3f}, {best.frechet:.3f}, {frechet(ours):.3f}"
        medians = f"{best.median:.4f}, {sum(r.median for r in ours) / len(ours):.4f}"
        fit = f"{max(r.fit_calls or 0 for r in ours):,} calls, {max(r.fit_seconds or 0 for r in ours):.0f} s"
        lines.append(
            f"| {name} | {cfg:g} | {calls} | {best.sampler}, {best.scheduler} | {best.error:.4f} ({best.low:.4f} to "
            f"{best.high:.4f}) | {shown} ({low:.4f} to {high:.4f}) | {mean / best.error:.2f} | {medians} | {distances} "
            f"| {fit} |"
        )
    if apart := [r for r in rows if r.apart]:
        lines += [
            "",
            "| Model | cfg | Calls | Best pair of CFG++ | Error to its own end (95 %) |",
            "|---|---|---|---|---|",
        ]
        for r in apart:
            pair = f"| {r.model} | {r.cfg:g} | {r.calls} | {r.sampler}, {r.scheduler} "
            lines.append(f"{pair}| {r.error:.4f} ({r.low:.4f} to {r.high:.4f}) |")
    others = [r for r in rows if r.seed is not None and r.sampler != "amed_multistep"]
    if others:
        lines += ["", "| Model | cfg | Calls | Student | Error (95 %) | Fit |", "|---|---|---|---|---|---|"]
        for r in others:
            fit = f"{r.fit_calls or 0:,} calls, {r.fit_seconds or 0:.0f} s"
            row = f"| {r.model} | {r.cfg:g} | {r.calls} | {r.sampler} | {r.error:.4f} ({r.low:.4f} to {r.high:.4f}) "
            lines.append(f"{row}| {fit} |")
    return "\n".join(lines)


def summary(rows: list[Row], published: list[Row]) -> str:
    """The main README's table: at 5 calls, and in short at 3 and 7; means over fits."""
    lines = [
        "| Model | cfg | Best stock pair at 5 calls | AMED, published | `amed_multistep` | of the stock pair's "
        "| of AMED's | Stock at 3, 7 calls | Ours at 3, 7 calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cfg in dict.fromkeys((r.model, r.cfg) for r in rows):
        stock = [r for r in rows if (r.model, r.cfg) == (name, cfg) and r.seed is None and r.scheduler and not r.apart]
        best = {calls: min((r for r in stock if r.calls == calls), key=lambda r: r.error) for calls in (3, 5, 7)}
        fits = [r for r in rows if (r.model, r.cfg, r.sampler) == (name, cfg, "amed_multistep")]
        ours = {calls: statistics.mean(r.error for r in fits if r.calls == calls) for calls in best}
        (paper,) = [r for r in published if (r.model, r.cfg, r.calls, r.sampler) == (name, cfg, 5, "amed published")]
        lines.append(
            f"| {name} | {cfg:g} | {best[5].sampler}, {best[5].scheduler}: {best[5].error:.4f} | {paper.error:.4f} | "
            f"{ours[5]:.4f} | {ours[5] / best[5].error:.2f} | {ours[5] / paper.error:.2f} | {best[3].error:.4f}, "
            f"{best[7].error:.4f} | {ours[3]:.4f}, {ours[7]:.4f} |"
        )
    return "\n".join(lines)
