"""What KSampler's sampler `amed` gives everybody who has no predictor, over the best stock pair, in a real ComfyUI.

    python benchmarks/everyday.py --json benchmarks/everyday.json   # goes on where it stopped
    python benchmarks/everyday.py --models mixture --uses inpainting --taught 4

Without a predictor the sampler learns while it samples. Each use of the list in everyday_rows.py begins with nothing
learned, in a user folder of its own. "AMED Learn" freezes it after 1, 2 and 4 pictures; pictures are drawn, each with
its own seed and prompt, until so many have taught. Then it draws the measured seeds, which never taught.

Errors are RMSEs over all seeds to where the ODE takes the same start, by ComfyUI's `heun` on many levels. Stock is the
best of six samplers on five schedulers and on the levels of our run, at equal true model calls, chosen on the very
seeds that judge. It starts and ends where our run does: there `denoise` decides nothing but the start. A run in two
parts is one in two parts for stock samplers, too.
"""
# ruff: noqa: E402 - ComfyUI can be imported only once comfyui_quality has loaded it

import argparse
import contextlib
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from benchmarks.comfyui_quality import MODELS, PACK, USUAL_MODELS, Counter, quiet

LEARNING = PACK.nodes.sampling.LEARNING

import comfy.sample
import comfy.samplers
import comfyui_version
import folder_paths
from stock import stock

from amed_core.schedules import fine
from benchmarks import everyday_rows as rows
from benchmarks.comfyui_models import Subject, subject
from benchmarks.everyday_rows import Book, Row, Use

SAMPLERS = ("dpmpp_2m", "euler", "ipndm", "ipndm_v", "uni_pc_bh2", "deis")
GRIDS = ("karras", "normal", "kl_optimal", "simple", "beta")
TAUGHT, SEEDS = (1, 2, 4), 8
MEASURED, IMAGES = 10_000, 20_000  # seeds from these on judge, and are images to begin with
TEACHING = 1000  # seeds that may teach one pupil
TRUTH_CALLS = 200
TEACHER_CALLS = 24
APART = 0.02  # of a weight's own spread: how far the second of two models is from the first


class Between:
    """A model's noise levels from `low` to `high`, for schedulers, which ask for nothing else."""

    def __init__(self, whole: Any, low: float, high: float) -> None:
        inside = (whole.sigmas > low * 1.000001) & (whole.sigmas < high * 0.999999)
        self.whole = whole
        self.sigmas = torch.cat([torch.tensor([low]), whole.sigmas[inside].cpu(), torch.tensor([high])])
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]
        self.timestep, self.sigma = whole.timestep, whole.sigma

    def get_model_object(self, name: str) -> Any:
        """Itself: KSampler asks a MODEL for its sampling."""
        del name
        return self


@dataclass(frozen=True)
class Given:
    """Noise for SamplerCustomAdvanced."""

    noise: Tensor
    seed: int = 0

    def generate_noise(self, latent: Any) -> Tensor:
        """What was given."""
        del latent
        return self.noise


class Heard(logging.Handler):
    """What this pack shows on a node also goes to the log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep ours."""
        if (text := record.getMessage()).startswith("AMED: "):
            self.said.append(text.removeprefix("AMED: "))


class Bench:
    """A model, and another one for low noise, whose calls are counted."""

    def __init__(self, name: str) -> None:
        self.name, self.about, self.counter = name, subject(PACK, name), Counter()
        self.high = self._counted(self.about)
        self.sampling = self.high.get_model_object("model_sampling")
        self.flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        self._low: Any = None

    def _counted(self, about: Subject) -> Any:
        model = about.model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", self.counter)
        return model

    @property
    def low(self) -> Any:
        """The same network with other weights, as a fine-tune has them."""
        if self._low is None:
            other, generator = subject(PACK, self.name), torch.Generator().manual_seed(0)
            with torch.inference_mode():
                for weight in other.model.model.diffusion_model.parameters():
                    drawn = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.add_(APART * weight.std(correction=0) * drawn)
            self._low = self._counted(other)
        return self._low

    def prompts(self, seeds: Sequence[int]) -> list[Any]:
        """What each seed asks for."""
        ((every, more),) = self.about.positive
        return [[every[[seed % self.about.classes for seed in seeds]], more]]

    def noise(self, seeds: Sequence[int], like: Tensor) -> Tensor:
        """What KSampler draws for each seed of its own."""
        return torch.cat([comfy.sample.prepare_noise(like[:1], seed) for seed in seeds])

    def image(self, seeds: Sequence[int]) -> Tensor:
        """A finished latent for each seed, of its prompt."""
        begin = self.about.latent[:1].repeat(len(seeds), *[1] * (self.about.latent.ndim - 1))
        noise = self.noise([IMAGES + seed for seed in seeds], begin)
        how = (20, rows.USUAL, "dpmpp_2m", "normal", self.prompts(seeds), self.about.negative)
        drawn: Tensor = comfy.sample.sample(self.high, noise, *how, begin, disable_pbar=True)
        return drawn

    def levels(self, sampler: str, scheduler: str, calls: int, high: float, low: float) -> Tensor:
        """A stock scheduler's levels (calls + 1,) for this sampler, from `high` to `low`."""
        least = float(self.sampling.sigma_min)
        bounds = Between(self.sampling, low or min(least, high / 2), high)
        steps = calls + (low > 0)
        found = comfy.samplers.KSampler(bounds, steps, torch.device("cpu"), sampler, scheduler).sigmas
        found = (found[:-1] if low else found).clone()
        found[0], found[-1] = high, low
        return found


class Case:
    """A use with the noise, prompts and images of some seeds."""

    def __init__(self, bench: Bench, use: Use, seeds: Sequence[int], model: Any = None) -> None:
        self.bench, self.use = bench, use
        self.high = model or bench.high
        self.two = use.kind in rows.OF_TWO
        self.positive, self.negative = bench.prompts(seeds), bench.about.negative
        self.latent = self._latent(seeds)
        self.noise = bench.noise(seeds, self.latent)
        self.mask = None
        if use.kind == rows.MASKED:
            height, width = self.latent.shape[-2:]
            self.mask = (torch.arange(width) < width // 2).float().expand(1, 1, height, width)

    def _latent(self, seeds: Sequence[int]) -> Tensor:
        use, bench = self.use, self.bench
        if use.kind in (rows.IMAGE, rows.MASKED):
            return bench.image(seeds)
        if use.kind == rows.UPSCALED:
            image = {"samples": bench.image(seeds)}
            large = stock("LatentUpscaleBy", samples=image, upscale_method="nearest-exact", scale_by=use.scale)
            return large[0]["samples"]
        shape = list(bench.about.latent.shape[1:])
        shape[-1] = round(shape[-1] * use.scale)
        return torch.zeros(len(seeds), *shape)

    @property
    def low(self) -> Any:
        """The model of the second part."""
        return self.bench.low if self.two else self.high

    def levels(self, sampler: str) -> Tensor:
        """Those that KSampler gives this use."""
        use = self.use
        about = (self.high, use.steps, torch.device("cpu"), sampler, use.scheduler, use.denoise)
        return comfy.samplers.KSampler(*about).sigmas.clone()

    def ours(self, sampler: str, low: Any = None) -> Tensor:
        """What the stock nodes give with a sampler of ours. `low` is the second model as "AMED Learn" made it."""
        use, kind = self.use, self.use.kind
        with torch.inference_mode(), quiet():
            if kind in (rows.SPLIT, rows.TWO_GUIDER):
                found = comfy.samplers.sampler_object(sampler)
                return self.custom(found, self.levels(sampler), low)
            if not use.cut:
                return self._k_sampler(self.high, sampler, self.noise, self.latent, denoise=use.denoise)
            half = self._k_sampler(
                self.high, sampler, self.noise, self.latent, last_step=use.cut, force_full_denoise=False
            )
            empty = torch.zeros_like(half)
            second = {"disable_noise": True, "start_step": use.cut, "force_full_denoise": True}
            return self._k_sampler(low or self.low, sampler, empty, half, **second)

    def _k_sampler(self, model: Any, sampler: str, noise: Tensor, latent: Tensor, **more: Any) -> Tensor:
        """As the nodes KSampler and KSamplerAdvanced do it, but every picture has a seed of its own."""
        use = self.use
        how = (use.steps, use.cfg, sampler, use.scheduler, self.positive, self.negative)
        drawn: Tensor = comfy.sample.sample(
            model, noise, *how, latent, noise_mask=self.mask, disable_pbar=True, seed=0, **more
        )
        return drawn

    def custom(self, sampler: Any, levels: Tensor, low: Any = None) -> Tensor:
        """By SamplerCustomAdvanced: through the guider of two models, or twice."""
        if self.use.kind == rows.TWO_GUIDER:
            switch = float(self.levels("euler")[self.use.cut])
            models = (self.high, low or self.low)
            guider = PACK.nodes.AMEDTwoModelsGuider.execute(
                *models, self.positive, self.negative, self.use.cfg, switch
            ).args[0]
            return self._advanced(guider, sampler, levels, Given(self.noise), self.latent)
        asked = {"positive": self.positive, "negative": self.negative, "cfg": self.use.cfg}
        guider = stock("CFGGuider", model=self.high, **asked)[0]
        first, second = stock("SplitSigmas", sigmas=levels, step=self.use.cut).args
        half = self._advanced(guider, sampler, first, Given(self.noise), self.latent)
        return self._advanced(guider, sampler, second, stock("DisableNoise")[0], half)

    def _advanced(self, guider: Any, sampler: Any, sigmas: Tensor, noise: Any, latent: Tensor) -> Tensor:
        asked = {"guider": guider, "sampler": sampler, "sigmas": sigmas, "noise": noise}
        drawn: Tensor = stock("SamplerCustomAdvanced", latent_image={"samples": latent}, **asked)[0]["samples"]
        return drawn

    def by(self, name: str, levels: Tensor) -> Tensor:
        """What a stock sampler makes of the same start on levels, in as many parts as ours."""
        sampler, cut = comfy.samplers.sampler_object(name), self.use.cut
        levels = levels.clone()  # some samplers write to them
        with torch.inference_mode(), quiet():
            if self.use.kind == rows.TWO_GUIDER:
                return self.custom(sampler, levels)
            if not cut:
                return self._part(self.high, sampler, levels, self.noise, self.latent)
            half = self._part(self.high, sampler, levels[: cut + 1], self.noise, self.latent)
            return self._part(self.low, sampler, levels[cut:], torch.zeros_like(half), half)

    def _part(self, model: Any, sampler: Any, levels: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        about = (sampler, levels, self.positive, self.negative, latent)
        drawn: Tensor = comfy.sample.sample_custom(
            model, noise, self.use.cfg, *about, noise_mask=self.mask, disable_pbar=True, seed=0
        )
        return drawn

    def truth(self, calls: int) -> Tensor:
        """Where the ODE leads, by Heun's method on levels without rounded timesteps; of two models part by part."""
        levels = self.levels("euler")
        high, flow = float(levels[0]), self.bench.flow
        least = min(float(self.bench.sampling.sigma_min), high / 2)
        smooth = PACK.nodes.timesteps.with_interpolated_timesteps
        heun = comfy.samplers.sampler_object("heun")
        with torch.inference_mode(), quiet():
            if not self.two:
                fall = torch.cat([fine(calls // 2, least, high, flow), torch.zeros(1)]).float()
                return self._part(smooth(self.high), heun, fall, self.noise, self.latent)
            switch = float(levels[self.use.cut])
            fall = fine(calls // 4, switch, high, flow).float()
            half = self._part(smooth(self.high), heun, fall, self.noise, self.latent)
            fall = torch.cat([fine(calls // 4, least, switch, flow), torch.zeros(1)]).float()
            return self._part(smooth(self.low), heun, fall, torch.zeros_like(half), half)

    def pairs(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every stock pair with its levels: first our own levels, then the schedulers between the same ends."""
        own = self.levels(LEARNING[0])
        yield from ((sampler, "", own) for sampler in SAMPLERS)
        calls, high, cut = len(own) - 1, float(own[0]), self.use.cut
        for sampler in SAMPLERS:
            for scheduler in GRIDS:
                if self.use.kind == rows.TWO:
                    switch = float(own[cut])
                    first = self.bench.levels(sampler, scheduler, cut, high, switch)
                    second = self.bench.levels(sampler, scheduler, calls - cut, switch, 0.0)
                    yield sampler, scheduler, torch.cat([first, second[1:]])
                else:
                    yield sampler, scheduler, self.bench.levels(sampler, scheduler, calls, high, 0.0)


def errors(drawn: Tensor, truth: Tensor) -> list[float]:
    """The RMSE of every picture, infinite where it is none."""
    squares = (drawn.cpu().double() - truth.cpu().double()).square().flatten(1).mean(1)
    return [math.sqrt(square) if math.isfinite(square) else math.inf for square in squares.tolist()]


def rms(each: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(sum(error**2 for error in each) / len(each))


@dataclass(frozen=True)
class Best:
    """A stock pair, and its error of every seed."""

    name: str = "none"
    each: tuple[float, ...] = (math.inf,)


@dataclass(frozen=True)
class Against:
    """What a use is measured by: the converged answer, and the best that stock samplers make of it."""

    truth: Tensor
    converged: float
    best: Best
    same_levels: Best

    @classmethod
    def of(cls, case: Case, calls: int) -> "Against":
        """Measure it. A stock run that takes another number of calls does not count."""
        truth = case.truth(calls)
        converged = rms(errors(case.truth(calls // 2), truth))
        same, every = Best(), Best()
        counter = case.bench.counter
        for sampler, scheduler, levels in case.pairs():
            if not bool((levels.diff() < 0).all()):
                continue
            counter.calls = 0
            try:
                drawn = case.by(sampler, levels)
            except Exception as error:
                print(f"{sampler}, {scheduler or case.use.scheduler}: {error}", file=sys.stderr)
                continue
            if counter.calls != len(levels) - 1:
                continue
            found = Best(f"{sampler}, {scheduler or case.use.scheduler}", tuple(errors(drawn, truth)))
            every = min(every, found, key=lambda one: rms(one.each))
            if not scheduler:
                same = min(same, found, key=lambda one: rms(one.each))
        return cls(truth, converged, every, same)


class Pupil:
    """A sampler of ours that begins with nothing learned, in a user folder of its own."""

    def __init__(self, bench: Bench, use: Use, sampler: str, folder: str, seed: int) -> None:
        self.bench, self.use, self.sampler, self.folder = bench, use, sampler, folder
        self.seed = seed  # the next one that may teach
        self.runs: list[int] = []
        self.heard = Heard()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing that others learned counts, and what is said is only heard."""
        usual, log = folder_paths.get_user_directory(), logging.getLogger()
        handlers, level = log.handlers, log.level
        folder_paths.set_user_directory(self.folder)
        log.handlers = [self.heard]
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            folder_paths.set_user_directory(usual)
            log.handlers = handlers
            log.setLevel(level)

    def after(self, pictures: int, seeds: Sequence[int]) -> tuple[Tensor, int]:
        """What it draws of some seeds once so many pictures have taught, and the model calls of that."""
        with self.alone():
            if self.use.kind == rows.LARGER:
                self.teach(replace(self.use, kind=rows.TEXT, scale=1.0), pictures)
            self.runs += self.teach(self.use, pictures)
            return self.draw(self.use, seeds, pictures)

    def teach(self, use: Use, pictures: int) -> list[int]:
        """Draw until so many pictures have taught and the last one was not slow; the calls of every run."""
        runs: list[int] = []
        while len(runs) < 4 * pictures + 4:
            _, calls = self.draw(use, range(self.seed, self.seed + use.batch), pictures)
            self.seed += use.batch
            runs.append(calls)
            if calls <= use.steps + 1 and self.learned(use) >= pictures:
                return runs
        raise RuntimeError(f"{pictures} pictures did not teach {use.text} in runs of {runs} calls")

    def draw(self, use: Use, seeds: Sequence[int], pictures: int) -> tuple[Tensor, int]:
        """Pictures of a use, of which so many teach, and the model calls that they took."""
        models = (self.bench.high, self.bench.low) if use.kind in rows.OF_TWO else (self.bench.high,)
        mode = ("from N pictures", pictures, TEACHER_CALLS, False)
        high, *low = (PACK.nodes.AMEDLearn.execute(model, *mode).args[0] for model in models)
        case = Case(self.bench, use, seeds, high)
        self.heard.said.clear()
        self.bench.counter.calls = 0
        drawn = case.ours(self.sampler, *low)
        return drawn, self.bench.counter.calls

    def learned(self, use: Use) -> int:
        """The pictures that every set of this size has learned from; none without a set."""
        situations = PACK.nodes.situations
        size = Case(self.bench, use, [self.seed]).latent[0].numel()
        states = [situations.read(path) for path in Path(self.folder).rglob("*.safetensors")]
        ratios = [state["situation"]["elements"] / size for state in states]
        alike = [s for s, ratio in zip(states, ratios, strict=True) if max(ratio, 1 / ratio) <= situations.ALIKE]
        return min((state["learner"]["pictures"] for state in alike), default=0)


def measured(bench: Bench, use: Use, book: Book, how: argparse.Namespace) -> Iterator[Row]:
    """The rows of a use that are not there yet, one after the other, since the learning is the same."""
    counts = sorted(n for n in how.taught if n >= use.batch) or [use.batch]
    if all((bench.name, how.sampler, use, n) in book for n in counts):
        return
    seeds = range(MEASURED, MEASURED + how.seeds)
    against = Against.of(Case(bench, use, seeds), how.truth_calls)
    best, same = against.best, against.same_levels
    with contextlib.ExitStack() as folders:
        empty = [folders.enter_context(tempfile.TemporaryDirectory()) for _ in range(how.pupils)]
        pupils = [Pupil(bench, use, how.sampler, folder, TEACHING * n) for n, folder in enumerate(empty)]
        for count in counts:
            begin = time.perf_counter()
            made = [pupil.after(count, seeds) for pupil in pupils]
            each = [error for drawn, _ in made for error in errors(drawn, against.truth)]
            row = Row(
                bench.name, how.sampler, use, count, min(pupil.learned(use) for pupil in pupils),
                max(calls for _, calls in made), rms(each), best.name, rms(best.each), same.name, rms(same.each),
                against.converged, each, list(best.each) * len(pupils), [list(pupil.runs) for pupil in pupils],
                list(dict.fromkeys(text for pupil in pupils for text in pupil.heard.said)), time.perf_counter() - begin,
            )  # fmt: skip
            if row.key not in book:
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=USUAL_MODELS, choices=MODELS)
    parser.add_argument("--uses", nargs="+", default=rows.KINDS, choices=rows.KINDS)
    parser.add_argument("--steps", type=int, nargs="+", help="only uses with these numbers of steps")
    parser.add_argument("--taught", type=int, nargs="+", default=TAUGHT, help="pictures that teach before it is judged")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pictures that judge")
    parser.add_argument("--pupils", type=int, default=1, help="as often it learns anew, from other pictures")
    parser.add_argument("--truth-calls", type=int, default=TRUTH_CALLS, help="of Heun's method")
    parser.add_argument(
        "--sampler", default=LEARNING[0], choices=LEARNING, help="both are the same without a predictor"
    )
    parser.add_argument("--json", type=Path, help="the file of all rows, which is also where to go on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {name: getattr(arguments, name) for name in ("seeds", "pupils", "truth_calls")}
    about["comfyui"] = comfyui_version.__version__
    book, failed = Book(arguments.json, about), []
    for name in arguments.models:
        bench = Bench(name)
        for use in rows.uses(name, arguments.uses):
            if arguments.steps and use.steps not in arguments.steps:
                continue
            try:
                for row in measured(bench, use, book, arguments):
                    book.add(row)
                    print(row.text(), flush=True)
            except Exception as error:  # a use that fails is a finding, and the others go on
                failed.append(f"{name}, {use}: {type(error).__name__}: {error}")
                print(f"FAILED {failed[-1]}", flush=True)
    print(rows.cells(book.rows), "", rows.summary(book.rows), "", *failed, sep="\n")


if __name__ == "__main__":
    main()
