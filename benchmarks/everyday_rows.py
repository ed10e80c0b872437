"""What people do with KSampler, and the rows that everyday.py leaves of it, with their tables in Markdown.

Needs neither ComfyUI nor torch.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OWN = "amed"  # the scheduler that leaves the levels to the sampler
STEPS, FEW, SCALES, USUAL = (3, 4, 5, 6, 8, 10, 12, 16), (5, 8), (1.0, 3.0, 6.0), 3.0
SCHEDULERS = ("normal", "karras", "exponential", "simple", "sgm_uniform", "kl_optimal", "beta", "ddim_uniform")
FOR_FLOW = "linear_quadratic"  # a scheduler of flow models alone
DENOISE = (0.2, 0.3, 0.5, 0.7, 0.9)
DIGITS = 5  # of what a file keeps
FLOW, FIXED_SIZE = ("colours", "pictures"), ("mixture",)

(
    TEXT, OTHERS, IMAGE, MASKED, UPSCALED, ADVANCED, SPLIT, BATCH, LARGER, TWO, TWO_GUIDER
) = KINDS = (
    "text-to-image", "schedulers", "image-to-image", "inpainting", "upscaled", "KSamplerAdvanced", "SplitSigmas",
    "batch", "larger", "two-models", "two-models-guider",
)  # fmt: skip
OF_TWO = (TWO, TWO_GUIDER)


@dataclass(frozen=True)
class Use:
    """One thing that somebody does with a sampler."""

    kind: str
    steps: int
    scheduler: str = OWN
    cfg: float = USUAL
    denoise: float = 1.0
    scale: float = 1.0  # of both sides of an image that is upscaled, or of the width of an empty latent
    batch: int = 1
    cut: int = 0  # the steps of the first of two parts

    @property
    def text(self) -> str:
        """What it is, but for steps, cfg and scheduler."""
        said = {
            OTHERS: "text-to-image",
            IMAGE: f"image-to-image, denoise {self.denoise:g}",
            UPSCALED: f"upscaled {self.scale:g} times, denoise {self.denoise:g}",
            ADVANCED: f"KSamplerAdvanced twice, from step {self.cut}",
            SPLIT: f"SplitSigmas at {self.cut}",
            BATCH: f"batch of {self.batch}",
            LARGER: f"latent {self.scale:g} times as large as one that taught",
            TWO: f"two models, second from step {self.cut}",
            TWO_GUIDER: f"two models in one guider, second from step {self.cut}",
        }
        return said.get(self.kind, self.kind)


def uses(model: str, kinds: Sequence[str] = KINDS) -> Iterator[Use]:
    """All that is to be done with a model."""
    for one in _every(model):
        sized = one.scale == 1.0 or model not in FIXED_SIZE
        if one.kind in kinds and sized and not (one.kind in OF_TWO and model in FIXED_SIZE):
            yield one


def _every(model: str) -> Iterator[Use]:
    yield from (Use(TEXT, steps, cfg=cfg) for cfg in SCALES for steps in STEPS)
    schedulers = (*SCHEDULERS, *([FOR_FLOW] if model in FLOW else []))
    yield from (Use(OTHERS, steps, name) for name in schedulers for steps in FEW)
    for steps in FEW:
        half = (steps + 1) // 2
        yield from (Use(IMAGE, steps, name, denoise=d) for name in (OWN, "karras", "normal") for d in DENOISE)
        yield from (Use(MASKED, steps, name) for name in (OWN, "karras"))
        yield from (Use(UPSCALED, steps, denoise=0.5, scale=scale) for scale in (1.5, 2.0))
        yield from (Use(kind, steps, name, cut=half) for kind in (ADVANCED, SPLIT) for name in (OWN, "normal"))
        yield Use(BATCH, steps, batch=4)
        yield from (Use(LARGER, steps, scale=scale) for scale in (1.25, 2.0))
        yield from (Use(kind, steps, cut=half) for kind in (TWO, TWO_GUIDER))


@dataclass
class Row:
    """A use after so many taught pictures, beside what stock samplers make of it."""

    model: str
    sampler: str
    use: Use
    taught: int  # pictures that were asked for
    pictures: int  # and those that taught: a batch teaches at once
    calls: int  # counted at the model, in every run that was measured
    error: float  # RMSE to the converged answer over all seeds
    stock: str  # the best pair
    stock_error: float
    same_levels: str  # the best stock sampler on the very levels of our run
    same_levels_error: float
    converged: float  # from half as many calls of the converged answer to it
    errors: list[float]  # of every seed, pupil after pupil
    stock_errors: list[float]
    runs: list[list[int]]  # the calls of every run that came before this row, of the same size, by pupil
    said: list[str] = field(default_factory=list)  # what the node showed
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it another row."""
        return self.model, self.sampler, self.use, self.taught

    @property
    def ratio(self) -> float:
        """Of the best stock pair's error."""
        return self.error / self.stock_error

    @property
    def same_levels_ratio(self) -> float:
        """Of the error of the best stock sampler on the same levels."""
        return self.error / self.same_levels_error

    @property
    def worst(self) -> float:
        """The ratio of the seed that fares worst."""
        return max(ours / theirs for ours, theirs in zip(self.errors, self.stock_errors, strict=True))

    @property
    def right_calls(self) -> bool:
        """Whether every run took as many calls as its list of levels has steps."""
        return self.calls == self.use.steps

    def text(self) -> str:
        """In one line, as it is measured."""
        u = self.use
        return (
            f"{self.model} | {u.text} | {u.scheduler}, {u.steps} steps, cfg {u.cfg:g} | {self.pictures} taught | "
            f"{self.error:.3g} | {self.stock}: {self.stock_error:.3g} | ratio {self.ratio:.2f}, same levels "
            f"{self.same_levels_ratio:.2f}, worst seed {self.worst:.2f} | {self.calls} calls | {' '.join(self.said)}"
        )


class Book:
    """The rows of a file, which is also where to go on. Without a file they are only kept in mind.

    `read` gives a file's rows, which are data classes with a key. Raises SystemExit if the file was measured under
    other conditions (`about`).
    """

    def __init__(
        self, file: Path | None, about: dict[str, Any], read: Callable[[Path], list[Any]] | None = None
    ) -> None:
        self.file, self.about = file, about
        self.rows: list[Any] = []
        if file is None or not file.exists():
            return
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["about"] != about:
            raise SystemExit(f"{file} was measured with {kept['about']}, and this is {about}.")
        self.rows = (read or load)(file)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: Any) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        if self.file is None or not self.rows:
            return
        part = self.file.with_suffix(".part")
        lines = ",\n".join(json.dumps(_short(asdict(row))) for row in self.rows)
        part.write_text(f'{{"about": {json.dumps(self.about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
        part.replace(self.file)


def _short(value: Any) -> Any:
    """The same with numbers of few digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def load(file: Path) -> list[Row]:
    """The rows of a file that everyday.py wrote."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [Row(**row | {"use": Use(**row["use"])}) for row in rows]


def by_use(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[int, Row]]:
    """The rows of every use of a model, by the pictures that taught."""
    found: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row.key[:-1], {})[row.taught] = row
    return found


def cells(rows: Sequence[Row]) -> str:
    """Every use, in Markdown: its ratios after so many taught pictures, and the seed that fares worst at the end."""
    counts = sorted({row.taught for row in rows})
    after = ", ".join(map(str, counts))
    lines = [
        "| Model | Use | cfg | Steps | Scheduler | Best stock pair | Its error "
        f"| Ratio after {after} pictures | on the same levels | Worst seed | Calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for some in by_use(rows).values():
        last = some[max(some)]
        use = last.use
        ratios = ", ".join(f"{some[n].ratio:.2f}" for n in sorted(some))
        same = ", ".join(f"{some[n].same_levels_ratio:.2f}" for n in sorted(some))
        lines.append(
            f"| {last.model} | {use.text} | {use.cfg:g} | {use.steps} | {use.scheduler} | {last.stock} "
            f"| {last.stock_error:.3g} | {ratios} | {same} | {last.worst:.2f} | {last.calls} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """A line for each kind of use of a model, with our scheduler and with others.

    It has geometric means, the worst use, and how many are worse than stock.
    """
    counts = sorted({row.taught for row in rows})
    after = ", ".join(map(str, counts))
    lines = [
        f"| Model | Use | Scheduler | Uses | Ratio after {after} pictures | Worst | Uses above 1 "
        "| Ratio on the same levels | Uses above 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, str, str], list[dict[int, Row]]] = {}
    for one in by_use(rows).values():
        row = one[max(one)]
        kind = TEXT if row.use.kind == OTHERS else row.use.kind
        scheduler = "`amed`" if row.use.scheduler == OWN else "others"
        kinds.setdefault((row.model, kind, scheduler), []).append(one)
    for (model, kind, scheduler), some in kinds.items():
        best = [[at(one, n).ratio for one in some] for n in counts]
        same = [[at(one, n).same_levels_ratio for one in some] for n in counts]
        worst = ", ".join(f"{max(now):.2f}" for now in best)
        cells = (_means(best), worst, _above(best), _means(same), _above(same))
        lines.append(f"| {model} | {kind} | {scheduler} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _means(ratios: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{mean(now):.2f}" for now in ratios)


def _above(ratios: Sequence[Sequence[float]]) -> str:
    return ", ".join(str(sum(ratio > 1 for ratio in now)) for now in ratios)


def at(one: dict[int, Row], taught: int) -> Row:
    """The row after so many pictures; a batch has none after fewer than it holds."""
    return one[min((n for n in one if n >= taught), default=max(one))]


def mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
