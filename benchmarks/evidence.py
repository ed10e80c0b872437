"""What a user can see and count of ours, on the bundled text-to-picture model, in a real ComfyUI.

    pip install -r benchmarks/requirements.txt                        # in ComfyUI's environment: SSIM and FLIP
    python benchmarks/evidence.py --json benchmarks/evidence.json     # hours; goes on where it stopped
    python benchmarks/evidence.py --json benchmarks/evidence.json --cfg 3 --calls 5 --kinds stock ours
    python benchmarks/evidence.py --json benchmarks/evidence.json --sheet sheet.png
    python benchmarks/tables.py --evidence benchmarks/evidence.json   # prints its tables

300 samples judge: 60 prompts with five seeds each, which no fit saw, no picture taught and no stock pair was chosen on.
The teacher is the model's ODE from the same noise, by Heun's method on many levels. "Latent" is the RMSE to it, in
latents of unit variance, and "decoded" that of the pictures, which are in [0, 1]. Intervals are by bootstrap over
prompts. Power, variety, saturation and contrast are over the teacher's: 1 is the same.

Stock is every deterministic sampler by every scheduler of ComfyUI at equal true model calls. All are tried on a few of
24 other prompts with a seed each, and the best of these on all 24. The three with the least decoded error there are
measured on all samples, and the best of the three, there, is what ours are compared with. The pairs that people use are
measured, too. CFG++ solves another equation: of its family the pair, and the scale of its own, that is nearest to the
same teacher has a row apart.

Ours are the predictors of "AMED Train Predictor" with its defaults, or by each of its efforts where it has such an
input; and the sampler `amed` after 1, 2 and 8 pictures have taught it, each for several draws of what teaches. The
paper's AMED-Solver and its plugin for iPNDM are as published, but for the number of trajectories, which the row states.

Which error stock has in how many calls is measured on the first samples of all: for every number of calls the best pair
of a short list, which is chosen on the 24 others.

A guided call is two passes of the network, and an unguided one is one. Calls and passes are counted. What is dear to
make again (teachers, what was drawn, which pairs were left) is kept in the folder
--keep, in one folder for each number of seeds, teacher and ComfyUI.
"""
# ruff: noqa: E402 - ComfyUI can be imported only once comfyui_quality has loaded it

import argparse
import copy
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from benchmarks import comfyui_quality as quality

PACK = quality.PACK

import comfy.sample
import comfy.samplers
import comfyui_version
from safetensors.torch import load_file, save_file

from benchmarks import everyday, looks
from benchmarks import evidence_rows as rows
from benchmarks.comfyui_models import Subject, prompts, subject
from benchmarks.comfyui_quality import Counter, Pair, Setting, quiet, sampler_of
from benchmarks.everyday_rows import OWN, TEXT, Book, Use
from benchmarks.evidence_rows import Row, Spread, Versus

MODEL, KEEP = "pictures", Path.home() / ".cache" / "amed-evidence"
PROMPTS, SEEDS, OTHERS = 60, 5, 24
# Which drawings are asked for. The first 128 are those of a fit.
TAUGHT_DRAWINGS, OTHER_DRAWINGS, JUDGED_DRAWINGS = 200, 600, 1000
JUDGED_SEEDS, OTHER_SEEDS = 10_000, 30_000  # and up to 10,000 teach
A_PUPIL = 40  # drawings that may teach one
TEACHER_CALLS, CHECKED_CALLS = 100, 400
GLANCED, LEFT, KEPT = 6, 24, 3  # other samples at a glance, pairs left after it, pairs measured on all samples
CELLS = ((3.0, 5), (1.0, 5), (6.0, 5), (3.0, 3), (3.0, 8), (1.0, 3), (1.0, 8), (6.0, 3), (6.0, 8), (1.0, 10), (1.0, 16))
LADDER, LADDER_SAMPLES, SHORT = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24), 120, 4  # of every cell's pairs
USED = (("euler", "simple"), ("dpmpp_2m", "karras"), ("uni_pc", "simple"), ("res_multistep", "simple"))
OF_MANY_CALLS = (  # what may be best with more calls than the cells have
    ("euler", "OptimalSteps Chroma"), ("euler", "beta"), ("dpmpp_2m", "simple"), ("dpmpp_2m", "beta"),
    ("ipndm", "OptimalSteps Chroma"), ("ipndm", "beta"), ("ipndm", "simple"), ("deis", "simple"), ("deis", "beta"),
    ("uni_pc_bh2", "simple"), ("uni_pc_bh2", "beta"), ("res_multistep", "beta"), ("gradient_estimation", "beta"),
    ("heun", "beta"), ("dpm_2", "beta"),
)  # fmt: skip
APART_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)  # of CFG++, whose scale is another
TAUGHT = (1, 2, 8)
EFFORTS = ("quick", "standard", "thorough")
PAPERS = ("amed", "amed_ipndm")
PAPER_TRAJECTORIES = 2000
SHEET, SIDE = 8, 128  # pictures of a row, and their pixels


class Passes:
    """Counts samples times passes of a MODEL's network, while it is open."""

    def __init__(self, model: Any) -> None:
        self.count, self.network = 0, model.model.diffusion_model

    def __enter__(self) -> "Passes":
        self.hook = self.network.register_forward_pre_hook(self._seen)
        return self

    def __exit__(self, *problem: Any) -> None:
        self.hook.remove()

    def _seen(self, network: Any, inputs: tuple[Tensor, ...]) -> None:
        del network
        self.count += len(inputs[0])


class Common:
    """The model with all its drawings' prompts, and the folder of what is dear to make again."""

    def __init__(self, folder: Path) -> None:
        self.about: Subject = subject(PACK, MODEL)
        _, clip, self.vae = PACK.nodes.AMEDDemoCheckpoint.execute().args
        known = PACK.amed_core.pictures.PicturesDenoiser()
        self.names = known.for_rows(range(JUDGED_DRAWINGS + PROMPTS)).prompts
        ((self.every, self.more),) = prompts(known, clip, 0, len(self.names))
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def asked(self, drawings: Sequence[int]) -> list[Any]:
        """The CONDITIONING of some drawings, a row each."""
        return [[self.every[list(drawings)], self.more]]

    def decoded(self, latents: Tensor) -> looks.Array:
        """Pictures (count, height, width, 3) in [0, 1]. What is no number is black."""
        with torch.inference_mode():
            found: looks.Array = self.vae.decode(latents.float()).nan_to_num(0.0).numpy()
        return found

    def file(self, *about: object) -> Path:
        """Where something is kept."""
        name = " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in about if part is not None)
        return self.folder / f"{name.replace('/', '-')}.safetensors"

    def kept(self, file: Path, make: Callable[[], Tensor]) -> Tensor:
        """What a file holds; else it is made and kept."""
        if not file.exists():
            keep(file, samples=make())
        return load_file(file)["samples"]


def keep(file: Path, **tensors: Tensor) -> None:
    """Write a file whole or not at all."""
    part = file.with_suffix(f".{os.getpid()}.part")  # others may make the same
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(file)


@dataclass(frozen=True)
class Drawn:
    """Samples, with the model calls and the passes that each took, and the seconds of all."""

    samples: Tensor
    calls: int
    passes: float
    seconds: float


class Judges(Setting):
    """Prompts, each with seeds of its own, at a scale of guidance: sample i is of prompt i modulo their number."""

    def __init__(self, common: Common, cfg: float, asked: int, drawing: int, seed: int, seeds: int, calls: int) -> None:
        self.common, self.name, self.cfg, self.teacher_calls = common, MODEL, cfg, calls
        self.samples, self.seed, self.prompts = asked * seeds, seed, asked
        positive = common.asked(range(drawing, drawing + asked))
        self.about = replace(common.about, positive=positive, classes=asked)
        empty = torch.zeros(1, *self.about.latent.shape[1:])
        self.noise = torch.cat([comfy.sample.prepare_noise(empty, seed + n) for n in range(self.samples)])
        self.real = None

    @functools.cached_property
    def truth(self) -> Tensor:
        """The teacher's samples."""
        file = self.common.file("teacher", self.cfg, self.teacher_calls, self.seed, self.samples)
        return self.common.kept(file, lambda: self.converged(self.teacher_calls))

    @functools.cached_property
    def pictures(self) -> looks.Array:
        """The teacher's pictures."""
        return self.common.decoded(self.truth)

    def at(self, cfg: float) -> "Judges":
        """The same samples at another scale of guidance, with the same teacher."""
        other = copy.copy(self)
        other.truth, other.pictures = self.truth, self.pictures
        other.cfg = cfg
        return other

    def by(self, sampler: Any, sigmas: Tensor, count: int, model: Any = None) -> Drawn:
        """What a SAMPLER draws of the first samples."""
        counter, counted = Counter(), (model or self.about.model).clone()
        counted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", counter)
        begin = time.perf_counter()
        with quiet(), Passes(counted) as passes:
            samples = self.sampled(sampler, sigmas.clone(), count, counted)  # some samplers write to them
        seconds, batches = time.perf_counter() - begin, len(list(self.batches(count)))
        return Drawn(samples, counter.calls // batches, passes.count / count, seconds)

    def latent_errors(self, samples: Tensor) -> looks.Array:
        """Of the first samples."""
        return looks.each_error(samples.numpy(), self.truth[: len(samples)].numpy())

    def decoded_errors(self, samples: Tensor) -> looks.Array:
        """Of the first samples, infinite where a latent is no number."""
        found = looks.each_error(self.common.decoded(samples), self.pictures[: len(samples)])
        return np.where(np.isfinite(self.latent_errors(samples)), found, math.inf)


class Lessons(everyday.Bench):
    """The model for who learns: seeds that judge ask for what they ask for above, and all others for other drawings."""

    def __init__(self, common: Common) -> None:
        super().__init__(MODEL)
        self.common = common

    def prompts(self, seeds: Sequence[int]) -> list[Any]:
        """What each seed asks for."""

        def drawing(seed: int) -> int:
            if seed >= JUDGED_SEEDS:
                return JUDGED_DRAWINGS + (seed - JUDGED_SEEDS) % PROMPTS
            pupil, picture = divmod(seed, everyday.TEACHING)
            return TAUGHT_DRAWINGS + A_PUPIL * pupil + picture % A_PUPIL

        return self.common.asked([drawing(seed) for seed in seeds])


def spread(errors: looks.Array, prompts: int) -> Spread:
    """Of the errors of samples, of which number i is of prompt i modulo `prompts`."""
    low, high = looks.rms_interval(by_prompt(errors, prompts))
    p90 = float(np.percentile(errors, 90))
    return Spread(
        looks.rms(errors), low, high, float(errors.mean()), float(np.median(errors)), p90, float(errors.max())
    )


def by_prompt(errors: looks.Array, prompts: int) -> looks.Array:
    """Errors (prompts, seeds)."""
    return errors.reshape(-1, prompts).T


def versus(other: str, ours: looks.Array, theirs: looks.Array, prompts: int) -> Versus:
    """Ours and theirs on the same samples."""
    low, high = looks.ratio_interval(by_prompt(ours, prompts), by_prompt(theirs, prompts))
    won, lost = int((ours < theirs).sum()), int((ours > theirs).sum())
    p = looks.sign_test(won, lost)
    return Versus(other, looks.rms(ours) / looks.rms(theirs), low, high, won / len(ours), p)


class Evidence:
    """All that is measured, piece after piece."""

    def __init__(self, common: Common, book: Book, how: argparse.Namespace) -> None:
        self.common, self.book, self.how = common, book, how

    @functools.cache  # noqa: B019 - there is one for the process
    def judges(self, cfg: float) -> Judges:
        """The samples that judge."""
        how = self.how
        return Judges(self.common, cfg, PROMPTS, JUDGED_DRAWINGS, JUDGED_SEEDS, how.seeds, how.teacher_calls)

    @functools.cache  # noqa: B019
    def others(self, cfg: float) -> Judges:
        """The samples on which stock pairs are chosen."""
        return Judges(self.common, cfg, OTHERS, OTHER_DRAWINGS, OTHER_SEEDS, 1, self.how.teacher_calls)

    def row(self, kind: str, name: str, drawn: Drawn, cfg: float, draw: int | None = None, **more: Any) -> Row:
        """A method, measured against the teacher, and kept."""
        judges, samples = self.judges(cfg), drawn.samples
        count, asked = len(samples), min(PROMPTS, len(samples))
        pictures, teacher = self.common.decoded(samples), judges.pictures[:count]
        latent, decoded = judges.latent_errors(samples), judges.decoded_errors(samples)
        about = (cfg, drawn.calls, kind, name, draw)
        keep(
            self.common.file(*about), samples=samples.half(), latent=torch.tensor(latent), decoded=torch.tensor(decoded)
        )
        if os.environ.get("AMED_GPU"):
            more["notes"] = more.get("notes", {}) | {"device": torch.cuda.get_device_name()}
        bands, sharp = looks.sharpness(pictures, teacher)
        over = [of(pictures) / of(teacher) for of in (looks.saturation, looks.contrast)]
        few = [float(of(errors[:LADDER_SAMPLES])) for errors in (latent, decoded) for of in (looks.rms, np.median)]
        row = Row(
            cfg, drawn.calls, round(drawn.passes, 4), kind, name, draw, count, drawn.seconds,
            spread(latent, asked), spread(decoded, asked), tuple(few),
            float(np.mean(looks.similarity(pictures, teacher))), float(np.mean(looks.flip(pictures, teacher))), bands,
            sharp, looks.variety(pictures, asked) / looks.variety(teacher, asked), *over, **more,
        )  # fmt: skip
        return self.compared(row)

    def compared(self, row: Row) -> Row:
        """The same row against the best stock pair of its cell, as far as what both drew is kept."""
        if row.kind in (rows.STOCK, rows.LADDER, rows.CHECK):
            return row
        found = {}
        for space in rows.SPACES:
            best = rows.best_stock(self.book.rows, row.cfg, row.calls, space)
            if best is None:  # once it is there
                continue
            files = [self.common.file(*one.key) for one in (row, best)]
            if all(file.exists() for file in files):
                ours, theirs = (load_file(file)[space].numpy() for file in files)
                found[f"{space}_versus"] = versus(best.name, ours, theirs, PROMPTS)
        return replace(row, **found)

    def stock_row(self, kind: str, pair: Pair, cfg: float, count: int, **notes: Any) -> Row:
        """A stock pair on the first samples."""
        drawn = self.judges(cfg).by(sampler_of(pair.sampler), pair.sigmas, count)
        return self.row(kind, named(pair), drawn, cfg, notes=notes)

    def ranked(self, pairs: Sequence[Pair], errors: Callable[[Pair], looks.Array]) -> list[tuple[float, Pair]]:
        """Pairs with their RMSEs, the least first. A pair that fails is left out."""
        found = []
        for pair in pairs:
            try:
                error = looks.rms(errors(pair))
            except Exception as problem:
                print(f"{named(pair)}: {problem}", file=sys.stderr)
                continue
            if math.isfinite(error):
                found.append((error, pair))
        return sorted(found, key=lambda one: one[0])

    def screened(self, cfg: float, calls: int, pairs: Sequence[Pair], name: str, kept: int) -> list[Pair]:
        """The pairs that are nearest to the teacher on other samples, nearest first; kept in a file.

        So many are left after a glance at few of the samples.
        """
        file = self.common.folder / f"{name} {cfg:g} {calls}.json"
        if file.exists():
            order = [tuple(one[:2]) for one in json.loads(file.read_text(encoding="utf-8"))]
            known = {(pair.sampler, pair.scheduler): pair for pair in pairs}
            return [known[one] for one in order]
        others = self.others(cfg)

        def drawn(pair: Pair, count: int) -> Tensor:
            return others.by(sampler_of(pair.sampler), pair.sigmas, count).samples

        def same(pair: Pair) -> tuple[Any, ...]:
            alias = {"ddim": "euler"}.get(pair.sampler, pair.sampler)
            return alias, tuple(round(level, 5) for level in pair.sigmas.tolist())

        once = list({same(pair): pair for pair in reversed(pairs)}.values())[::-1]
        if len(once) > kept:
            glance = self.ranked(once, lambda pair: others.latent_errors(drawn(pair, GLANCED)))
            once = [pair for _, pair in glance[:kept]]
        left = self.ranked(once, lambda pair: others.decoded_errors(drawn(pair, OTHERS)))
        file.write_text(json.dumps([[p.sampler, p.scheduler, e] for e, p in left], indent=1), encoding="utf-8")
        return [pair for _, pair in left]

    def pairs(self, wanted: tuple[int, ...], only: frozenset[tuple[str, str]] | None = None) -> dict[int, list[Pair]]:
        """Stock pairs by their number of calls; these do not depend on guidance."""
        return quality.pairs(self.others(1.0), wanted, only)

    def plain_pairs(self, calls: int) -> list[Pair]:
        """All pairs of so many calls that follow the model's own equation."""
        return [pair for pair in self._every(calls) if not quality.other_equation(pair.sampler)]

    def _every(self, calls: int) -> list[Pair]:
        wanted = next(counts for counts in ((3, 5, 8), (10, 16)) if calls in counts)
        return self.pairs(wanted)[calls]

    def stock(self, cfg: float, calls: int) -> Iterator[Row]:
        """The best pairs of all."""
        pairs = self.plain_pairs(calls)
        for pair in self.screened(cfg, calls, pairs, "screened", LEFT)[:KEPT]:
            if (cfg, calls, rows.STOCK, named(pair), None) not in self.book:
                yield self.stock_row(rows.STOCK, pair, cfg, self.judges(cfg).samples, pairs=len(pairs))

    def used(self, cfg: float, calls: int) -> Iterator[Row]:
        """What people choose."""
        for pair in self.pairs((calls,), frozenset(USED))[calls]:
            if (cfg, calls, rows.USED, named(pair), None) not in self.book:
                yield self.stock_row(rows.USED, pair, cfg, self.judges(cfg).samples)

    def apart(self, cfg: float, calls: int) -> Iterator[Row]:
        """The pair of CFG++ that is nearest to the same teacher, at whichever scale of its own."""
        pairs = [pair for pair in self._every(calls) if quality.other_equation(pair.sampler)]
        others, best = self.others(cfg), []
        for scale in APART_SCALES:
            there = others.at(scale)

            def glance(pair: Pair, there: Judges = there) -> looks.Array:
                return others.latent_errors(there.by(sampler_of(pair.sampler), pair.sigmas, GLANCED).samples)

            best += [(error, scale, pair) for error, pair in self.ranked(pairs, glance)[:1]]
        _, scale, pair = min(best, key=lambda one: one[0])
        judges = self.judges(cfg)
        drawn = judges.at(scale).by(sampler_of(pair.sampler), pair.sigmas, judges.samples)
        yield self.row(rows.APART, f"{named(pair)}, cfg {scale:g}", drawn, cfg)

    def ladder(self, cfg: float, calls: int) -> Iterator[Row]:
        """The best pair of a short list in so many calls."""
        short = set(OF_MANY_CALLS) | set(USED)
        for other, count in CELLS:
            file = self.common.folder / f"screened {cfg:g} {count}.json"
            if other == cfg and file.exists():
                short |= {tuple(one[:2]) for one in json.loads(file.read_text(encoding="utf-8"))[:SHORT]}
        pairs = self.pairs(LADDER, frozenset(short))[calls]
        (best, *_) = self.screened(cfg, calls, pairs, "rung", KEPT)
        yield self.stock_row(rows.LADDER, best, cfg, min(LADDER_SAMPLES, self.judges(cfg).samples), pairs=len(pairs))

    def fit(self, kind: str, name: str, cfg: float, calls: int, seed: int, **settings: Any) -> Row:
        """A predictor from a training node, used as KSampler uses it."""
        judges = self.judges(cfg)
        made, seconds = quality.fitted(judges, calls, seed, **settings)
        model, sampler, sigmas = quality.applied(judges, made, calls)
        drawn = judges.by(comfy.samplers.sampler_object(sampler), sigmas, judges.samples, model)
        if drawn.calls != calls:
            raise RuntimeError(f"{name} took {drawn.calls} calls instead of {calls}")
        training = made.notes.get("training", {})
        fit = {"fit_calls": training.get("model_calls"), "fit_seconds": seconds}
        return self.row(kind, name, drawn, cfg, seed, **fit)

    def ours(self, cfg: float, calls: int) -> Iterator[Row]:
        """The training node's fits."""
        for name, settings in efforts(self.how.efforts).items():
            for seed in range(self.how.fits):
                if (cfg, calls, rows.OURS, name, seed) not in self.book:
                    yield self.fit(rows.OURS, name, cfg, calls, seed, **settings)

    def published(self, cfg: float, calls: int) -> Iterator[Row]:
        """AMED-Solver and its plugin as published."""
        for sampler in PAPERS:
            count = self.how.trajectories
            name = f"{sampler} as published, {count:,} trajectories"
            if (cfg, calls, rows.PAPER, name, 0) not in self.book:
                settings = {"sampler_name": sampler, "preset": "paper", "trajectories": count}
                yield self.fit(rows.PAPER, name, cfg, calls, 0, **settings)

    def learned(self, cfg: float, calls: int) -> Iterator[Row]:
        """The sampler `amed` without a predictor, after some pictures."""
        use, seeds = Use(TEXT, calls, OWN, cfg), range(JUDGED_SEEDS, JUDGED_SEEDS + self.judges(cfg).samples)
        for draw in range(self.how.draws):
            names = {count: f"learned from {count}" for count in TAUGHT}
            if all((cfg, calls, rows.LEARNED, name, draw) in self.book for name in names.values()):
                continue
            bench = Lessons(self.common)
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                pupil = everyday.Pupil(bench, use, everyday.LEARNING[0], folder, everyday.TEACHING * draw)
                for count, name in names.items():
                    drawn = self.after(pupil, count, seeds)
                    if drawn.calls != calls:
                        raise RuntimeError(f"{name} took {drawn.calls} calls instead of {calls}")
                    if (cfg, calls, rows.LEARNED, name, draw) not in self.book:
                        notes = {"calls of every run": list(pupil.runs)}
                        yield self.row(rows.LEARNED, name, drawn, cfg, draw, fit_calls=sum(pupil.runs), notes=notes)

    def after(self, pupil: everyday.Pupil, count: int, seeds: Sequence[int]) -> Drawn:
        """What a pupil draws once so many pictures have taught."""
        with pupil.alone():
            pupil.runs += pupil.teach(pupil.use, count)
            begin = time.perf_counter()
            with Passes(pupil.bench.high) as passes:
                parts = [pupil.draw(pupil.use, seeds[n : n + PROMPTS], count) for n in range(0, len(seeds), PROMPTS)]
        calls = max(found for _, found in parts)
        samples = torch.cat([drawn for drawn, _ in parts])
        return Drawn(samples, calls, passes.count / len(seeds), time.perf_counter() - begin)

    def check(self, cfg: float, calls: int) -> Iterator[Row]:
        """How far the teacher is from itself in many more calls, on its first samples."""
        del calls
        judges, count = self.judges(cfg), OTHERS // 2
        finer = copy.copy(judges)
        finer.samples = count
        drawn = finer.converged(CHECKED_CALLS)
        row = self.row(rows.CHECK, f"{CHECKED_CALLS} calls of Heun's method", Drawn(drawn, CHECKED_CALLS, 0, 0.0), cfg)
        yield row


def efforts(wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is asked of the training node, by the row's name: these efforts if it has them, or its defaults."""
    inputs = {one.id: one for one in PACK.nodes.AMEDTrainPredictor.GET_SCHEMA().inputs}
    if "effort" not in inputs:
        return {rows.DEFAULT: {}}
    return {name: {"effort": name} for name in wanted if name in inputs["effort"].options}


def named(pair: Pair) -> str:
    """A pair in words."""
    return f"{pair.sampler}, {pair.scheduler}"


def pieces() -> Iterator[tuple[str, float, int]]:
    """What is measured, in this order: kind, scale of guidance and calls."""
    scales = list(dict.fromkeys(cfg for cfg, _ in CELLS))
    main = (rows.STOCK, rows.OURS, rows.LEARNED, rows.USED)
    first = [cell for cell in CELLS if cell[1] == rows.GOAL_CALLS]
    yield from ((kind, *cell) for cell in first for kind in main)
    yield from ((rows.LADDER, cfg, calls) for cfg in scales for calls in LADDER)
    yield from ((rows.CHECK, cfg, CHECKED_CALLS) for cfg in scales)
    yield from ((kind, *cell) for cell in CELLS if cell not in first for kind in main)
    yield from ((rows.APART, *cell) for cell in CELLS)
    yield from ((rows.PAPER, *cell) for cell in first)


def done(book: Book, kind: str, cfg: float, calls: int) -> bool:
    """Whether a piece of one row is there."""
    once = (rows.LADDER, rows.CHECK, rows.APART)
    return kind in once and any((row.kind, row.cfg, row.calls) == (kind, cfg, calls) for row in book.rows)


def sheet(common: Common, measured: Sequence[Row], how: argparse.Namespace, file: Path) -> None:
    """The first pictures of the teacher, the best stock pair and ours, below one another."""
    from PIL import Image, ImageDraw  # noqa: PLC0415 - ComfyUI ships it

    (cfg, *_), (calls, *_) = how.cfg or (CELLS[0][0],), how.calls or (CELLS[0][1],)
    stock = rows.best_stock(measured, cfg, calls)
    cell = [row for row in measured if (row.cfg, row.calls) == (cfg, calls) and row.draw in (None, 0)]
    shown = [("teacher", common.file("teacher", cfg, how.teacher_calls, JUDGED_SEEDS, PROMPTS * how.seeds))]
    shown += [(f"best stock, {stock.name}", common.file(*stock.key))] if stock else []
    for kind in (rows.OURS, rows.LEARNED, rows.USED):
        name = {rows.OURS: "ours, ", rows.LEARNED: "ours, "}.get(kind, "")
        shown += [(f"{name}{row.name}", common.file(*row.key)) for row in cell if row.kind == kind]
    lines = []
    for _, kept in shown:
        pictures = torch.from_numpy(common.decoded(load_file(kept)["samples"][:SHEET]))
        lines.append((pictures * 255).round().to(torch.uint8))
    head = 14
    made = Image.new("RGB", (SHEET * SIDE, len(lines) * (SIDE + head)), "white")
    pen = ImageDraw.Draw(made)
    for number, ((name, _), line) in enumerate(zip(shown, lines, strict=True)):
        top = number * (SIDE + head)
        pen.text((2, top + 1), f"{name}; cfg {cfg:g}, {calls} calls" if number else name, fill="black")
        for place, picture in enumerate(line):
            made.paste(Image.fromarray(picture.numpy()), (place * SIDE, top + head))
    made.save(file)
    asked = common.names[JUDGED_DRAWINGS : JUDGED_DRAWINGS + SHEET]
    print(f"{file}: {', '.join(asked)}; from above: {'; '.join(name for name, _ in shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=float, nargs="+", help="only these scales of guidance")
    parser.add_argument("--calls", type=int, nargs="+", help="only these numbers of calls")
    parser.add_argument("--kinds", nargs="+", default=rows.KINDS, choices=rows.KINDS)
    parser.add_argument("--efforts", nargs="+", default=EFFORTS, choices=EFFORTS, help="of the training node")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of every prompt")
    parser.add_argument("--teacher-calls", type=int, default=TEACHER_CALLS)
    parser.add_argument(
        "--fits", type=int, default=1, help="of every effort of the training node, with seeds of its own"
    )
    parser.add_argument("--draws", type=int, default=3, help="of the pictures that teach")
    parser.add_argument("--trajectories", type=int, default=PAPER_TRAJECTORIES, help="of AMED as published")
    parser.add_argument("--keep", type=Path, default=KEEP, help="the folder of what is dear to make again")
    parser.add_argument("--sheet", type=Path, help="a picture of pictures, of what was measured in a cell")
    parser.add_argument("--json", type=Path, help="the file of all rows, which is also where to go on")
    how = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, with AMED_GPU=1, in float32 like on a CPU
    about = {"seeds": how.seeds, "teacher_calls": how.teacher_calls, "comfyui": comfyui_version.__version__}
    book = Book(how.json, about, rows.load)
    common = Common(how.keep / " ".join(map(str, about.values())))
    evidence = Evidence(common, book, how)
    work = {
        rows.STOCK: evidence.stock, rows.USED: evidence.used, rows.OURS: evidence.ours, rows.LEARNED: evidence.learned,
        rows.PAPER: evidence.published, rows.APART: evidence.apart, rows.LADDER: evidence.ladder,
        rows.CHECK: evidence.check,
    }  # fmt: skip
    book.rows = [evidence.compared(row) for row in book.rows]
    book.save()
    for kind, cfg, calls in () if how.sheet else pieces():
        wanted = kind in how.kinds and cfg in (how.cfg or [cfg]) and calls in (how.calls or [calls])
        if wanted and not done(book, kind, cfg, calls):
            for row in work[kind](cfg, calls):
                book.add(row)
                print(row.text(), flush=True)
    if how.sheet:
        sheet(common, book.rows, how, how.sheet)
    else:
        print(rows.tables(book.rows))


if __name__ == "__main__":
    main()
