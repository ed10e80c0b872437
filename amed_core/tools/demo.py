"""The whole job on the bundled text-to-picture model: fit, compare at equal calls, look."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..driver import sample
from ..files import provenance, save_predictor, write_json
from ..fit.baselines import bench_methods
from ..fit.efforts import MOST_CALLS
from ..fit.make import fit_predictor
from ..pictures import PicturesDenoiser, PicturesModel, load_pictures
from ..samplers import MULTISTEP_STUDENT
from ..types import Answer, Method, Sample, Sigma
from .bench import Bench, BenchSettings, Row, as_json, method_of, table
from .measures import error
from .plots import sheet

CALLS, CFG = 5, 3.0
TEACHER_CALLS, BATCH = 100, 16
PROMPTS = (
    *("strawberry", "penguin", "rocket", "cat face", "octopus", "hamburger"),
    *("tulip", "snowman", "owl", "rose", "slice of pizza", "birthday cake"),
)
SHOWN = len(PROMPTS)
UNSEEN = 1000  # rows from here on ask for other drawings than the first ones, which a fit learns from
KEPT = 4  # unlearned pairs that are measured on all noises: the best on those that are shown
GAIN = 4  # of the differences that are shown

Heard = Callable[[int], object]  # is told how many samples a model call has


class Counted(PicturesDenoiser):
    """The bundled model at the demo's cfg, with its calls counted."""

    def __init__(self, model: PicturesModel, heard: Heard) -> None:
        super().__init__(CFG, model)
        self.heard = heard

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        self.heard(len(x))
        return super().__call__(x, sigma)


class Judged(Counted):
    """The same, asked for the shown prompts first, and then for drawings that no fit has asked for."""

    def for_rows(self, rows: Sequence[int]) -> PicturesDenoiser:
        """The denoiser of samples number `rows`: the shown prompts come first."""
        others = super().for_rows([row + UNSEEN for row in rows]).prompts or ()
        shown = [PROMPTS[row] if row < SHOWN else other for row, other in zip(rows, others, strict=True)]
        return self.for_prompts(shown)


def demo(output: Path, samples: int, trajectories: int = 0, model: PicturesModel | None = None) -> None:
    """Fit the default predictor at 5 calls and cfg 3, print a table, write picture, table and predictor to `output`.

    `trajectories` are those of the fit, 0 for as many as usual.
    """
    begin = time.monotonic()
    pictures, samples = model or load_pictures(), max(samples, SHOWN)
    pairs = stock_pairs(pictures)
    print(
        f"{MULTISTEP_STUDENT} is fitted to the bundled text-to-picture model at cfg {CFG:g} and compared with "
        f"{len(pairs)} pairs of an unlearned solver and grid, at {CALLS} model calls:"
    )
    measuring = samples * (TEACHER_CALLS + CALLS * (KEPT + 1)) + SHOWN * CALLS * (len(pairs) + 2)
    with tqdm(total=MOST_CALLS["standard"] + measuring, unit="call", unit_scale=True) as bar:
        counted, judged = Counted(pictures, bar.update), Judged(pictures, bar.update)
        bar.set_postfix_str("fit")
        fit = fit_predictor(counted, MULTISTEP_STUDENT, CALLS, trajectories=trajectories, guidance=CFG)
        seconds = time.monotonic() - begin
        notes = provenance(fit.summary().header())
        save_predictor(fit.predictor, output / f"{MULTISTEP_STUDENT}.safetensors", notes)

        bar.set_postfix_str("comparison")
        settings = BenchSettings((CALLS,), samples, teacher_calls=TEACHER_CALLS, batch=BATCH)
        bench = Bench(judged, settings, lambda name, calls: None)
        ours = method_of(fit.predictor, MULTISTEP_STUDENT)
        learned = bench.row(ours, CALLS, fit.model_calls, seconds)
        unlearned = sorted(
            (bench.row(pair, CALLS) for pair in screened(pairs, judged, bench)), key=lambda row: row.rank
        )
        winner = next(pair for pair in pairs if pair.name == unlearned[0].method)
        asked, x, teacher = judged.for_rows(range(SHOWN)), bench.x[:SHOWN], bench.teacher[:SHOWN]
        latents = (teacher, sample(asked, x, winner), sample(asked, x, ours))
        bar.total = bar.n
    print(table([learned, *unlearned]))
    print(conclusion(learned, unlearned[0], samples))
    write_json(output / "bench.json", as_json([learned, *unlearned]))
    sheet(PROMPTS, labelled(learned, unlearned[0], latents, pictures)).save(output / "pictures.png")
    print(f"{output}/: pictures.png, bench.json and the predictor, in {time.monotonic() - begin:.0f} s")


def stock_pairs(model: PicturesModel) -> list[Method]:
    """The unlearned solvers and grids that are like ComfyUI's own: they end at 0, and every step asks the model."""
    every = bench_methods(Judged(model, lambda count: None), CALLS)
    return [pair for pair in every if pair.name.endswith(" zero")]


def screened(pairs: Sequence[Method], judged: Judged, bench: Bench) -> list[Method]:
    """The best pairs on the noises that are shown."""
    asked, x, teacher = judged.for_rows(range(SHOWN)), bench.x[:SHOWN], bench.teacher[:SHOWN]
    return sorted(pairs, key=lambda pair: error(sample(asked, x, pair), teacher).rmse)[:KEPT]


def conclusion(learned: Row, unlearned: Row, samples: int) -> str:
    """Who wins, in words: by the error over all samples, and on the sample in the middle."""
    lines = []
    for name, ours, theirs in (
        ("all pictures (RMSE)", learned.error, unlearned.error),
        ("the picture in the middle (median)", learned.error_median, unlearned.error_median),
    ):
        if ours is None or theirs is None:
            continue
        who = "AMED is nearer to the teacher" if ours < theirs else "stock is nearer to the teacher"
        lines.append(f"On {name} {who}: AMED {ours:.4f}, best stock pair {theirs:.4f}, ratio {ours / theirs:.2f}.")
    lines.append(
        f"Measured on {samples} noises and prompts that the fit has not seen. The best of the pairs is chosen on them, "
        "which no user could do, and which favours stock."
    )
    return "\n".join(lines)


def labelled(learned: Row, unlearned: Row, latents: Sequence[Tensor], model: PicturesModel) -> list[tuple[str, Tensor]]:
    """The sheet's rows: the teacher's pictures, and each method's with their differences to those.

    `latents` (shown, 8, 16, 16) are the teacher's, the unlearned method's and the learned one's.
    """
    teacher, theirs, ours = (model.vae.decode(drawn).clamp(-1, 1) for drawn in latents)
    name = unlearned.method.removesuffix(" zero")
    rows = [(f"teacher\n{TEACHER_CALLS} calls", teacher)]
    for label, row, drawn in ((f"best stock\n{name}", unlearned, theirs), ("AMED", learned, ours)):
        rows.append((f"{label}\n{CALLS} calls\nerror {row.error or 0.0:.3f}", drawn))
        rows.append((f"{GAIN} x its\ndifference", GAIN * (drawn - teacher).abs() - 1))  # black is none
    return rows
