"""`python -m amed_core`: demo, train, sample, bench, first, inspect."""

import argparse
import contextlib
import importlib.util
import inspect as inspection
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from ..config import PredictorConfig
from ..digits import DigitsDenoiser
from ..driver import sample
from ..files import load_predictor, load_state, provenance, read_notes, save_predictor, save_state, write_json
from ..fit.call_derivative import GRADIENTS
from ..fit.efforts import EFFORTS, settings_of
from ..fit.grid_search import SEARCH_TRAJECTORIES, search
from ..fit.make import facts_of, is_differentiable, make_fit, make_passes, make_set, usual_settings
from ..fit.protocol import Fit, FitConfig, TrainConfig
from ..fit.several import Use, numbers_of
from ..fit.teacher import TEACHERS
from ..fit.trajectories import chunks, conditioned, gaussian
from ..fit.workers import Workers, torchrun
from ..pictures import PicturesDenoiser
from ..predictor import Predictor
from ..samplers import MULTISTEP_STUDENT, NAMES, Kind, student_config
from ..schedules import SCHEDULES, SEARCHED
from ..types import Model, Source
from . import first
from .bench import BenchSettings, as_json, bench_with_bar, best_of_each, method_of, table

BUNDLED: dict[str, Callable[[float], Model]] = {"digits": DigitsDenoiser, "pictures": PicturesDenoiser}
REQUIRED = ("shape", "sigma_min", "sigma_max")
SHAPING = ("schedule", "rho", "scale_dir", "scale_time", "max_order", "hidden", "prediction")  # what is fitted
TRAINING = ("epochs", "teacher", "teacher_points", "learning_rate", "held_out", "gradient", "batch_size")  # and how


def load_denoiser(place: str, cfg: float | None = None) -> Model:
    """Build the denoiser that `--denoiser` names: a bundled one, or FILE.py:NAME where NAME() returns one.

    Raises ValueError or FileNotFoundError that says what is missing.
    """
    if place in BUNDLED:
        return BUNDLED[place](1.0 if cfg is None else cfg)
    file, _, name = place.rpartition(":")
    if not file:
        raise ValueError(f'--denoiser is "digits", "pictures" or FILE.py:NAME, but found {place!r}.')
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (from --denoiser {place}).")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with importable(path.parent):
        spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        defined = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"{path} defines no {name}. It defines: {', '.join(defined) or 'nothing callable'}.")
    if cfg is not None and "cfg" not in inspection.signature(factory).parameters:
        raise ValueError(f"{name} of {path} takes no cfg; leave --cfg out.")
    model = factory(cfg=cfg) if cfg is not None else factory()
    if missing := [attribute for attribute in REQUIRED if not hasattr(model, attribute)]:
        raise ValueError(f"What {name}() of {path} returns lacks {', '.join(missing)}.")
    if not callable(model):
        raise ValueError(f"What {name}() of {path} returns cannot be called with (x, sigma).")
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """A denoiser's file may import its neighbours."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def fingerprint_of(place: str, model: Model) -> dict[str, str | int | float]:
    """What a predictor file remembers of the model."""
    own: dict[str, str | int | float] | None = getattr(model, "fingerprint", None)
    return own or {
        "family": place.rpartition(":")[2],
        "latent_channels": int(model.shape[0]),
        "sigma_min": float(model.sigma_min),
        "sigma_max": float(model.sigma_max),
    }


def check_model(predictor: Predictor, place: str, model: Model) -> None:
    """Raise ValueError if the predictor was made for another model."""
    made_for, found = predictor.config.model, fingerprint_of(place, model)
    differing = [key for key in found if key in made_for and made_for[key] != found[key]]
    if differing:
        raise ValueError(
            "This predictor was made for another model: "
            + ", ".join(f"{key} {made_for[key]!r}, but {place} has {found[key]!r}" for key in differing)
            + ". Choose another predictor or another --denoiser."
        )


def run_demo(arguments: argparse.Namespace) -> None:
    """Fit and compare on the bundled text-to-picture model."""
    from .demo import demo  # noqa: PLC0415 - needs Pillow

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    demo(arguments.output, arguments.samples, arguments.trajectories)


def run_train(arguments: argparse.Namespace) -> None:
    """Fit and save a predictor. Raises ValueError for options that contradict each other."""
    scales = arguments.cfg or [None]
    arguments.calls = numbers_of(arguments.calls)
    models = [load_denoiser(arguments.denoiser, cfg) for cfg in scales]
    with torchrun(getattr(models[0], "device", "cpu")) as workers:
        if workers.count > 1 and (arguments.state or arguments.resume):
            raise ValueError("Several processes keep no common state: leave out --state and --resume.")
        _train(arguments, scales, models, workers)


def _train(
    arguments: argparse.Namespace, scales: Sequence[float | None], models: Sequence[Model], workers: Workers
) -> None:
    """Fit what the arguments ask for, on this worker's part of the trajectories; the first worker saves and speaks."""
    model, device = models[0], getattr(models[0], "device", "cpu")
    config = _asked(arguments, models, scales, arguments.calls[0])
    sources = [gaussian(m, tuple(m.shape), config.sigmas[0], arguments.seed, device) for m in models]
    if arguments.schedule == SEARCHED:
        x, denoiser = sources[0](range(SEARCH_TRAJECTORIES))
        config = search(denoiser, x, config)
    settings = _settings(arguments, config, model)
    about: dict[str, Any] = {"model_sigmas": getattr(model, "sigmas", None), "seed": arguments.seed}
    fit: Fit
    seedless = {"model_sigmas": about["model_sigmas"], "workers": workers}
    if arguments.passes:
        fit = _passes_fit(arguments, models, scales, sources, seedless)
    elif uses := _uses(arguments):
        configs = {n: _asked(arguments, models, scales, n) for n in arguments.calls}
        own = {n: settings_of(arguments.effort, n, len(configs)) for n in configs}
        fit = make_set(uses, configs.__getitem__, own.__getitem__, sources, **seedless)
    else:
        fit = make_fit(config, settings, sources, workers=workers, device=device, **about)
    if arguments.resume:
        fit.load_state_dict(load_state(arguments.resume))
    try:
        with tqdm(total=fit.expected_calls, initial=fit.model_calls, unit="call", disable=workers.rank > 0) as bar:
            for event in fit.events():
                bar.set_postfix_str(str(event), refresh=False)
                bar.total = max(fit.expected_calls, fit.model_calls)
                bar.update(fit.model_calls - bar.n)
            bar.total = bar.n
    except KeyboardInterrupt:
        if not arguments.state:
            raise
        save_state(arguments.state, fit.state_dict())
        print(f"Stopped. Go on with --resume {arguments.state}")
        return
    if arguments.state:
        save_state(arguments.state, fit.state_dict())
    if workers.rank == 0:
        summary = fit.summary()
        save_predictor(fit.predictors, arguments.output, provenance({**summary.header(), "seed": arguments.seed}))
        every = fit.predictors
        calls, passes = (", ".join(map(str, n)) for n in (every.calls, [one.config.passes for one in every.from_noise]))
        print(f"{arguments.output}: {calls} model calls, which are {passes} passes of the network")
        print(f"{summary.model_calls:,} sample calls of training")
        if summary.sentence():
            print(summary.sentence())
        for warning in summary.warnings():
            print(f"amed_core: {warning}", file=sys.stderr)


def _passes_fit(
    arguments: argparse.Namespace,
    models: Sequence[Model],
    scales: Sequence[float | None],
    sources: Sequence[Source],
    about: Mapping[str, Any],
) -> Fit:
    """The fit for a number of passes. Raises ValueError for a sampler or for options that have none."""
    if arguments.solver != MULTISTEP_STUDENT or len(models) > 1 or len(_uses(arguments)) > 1:
        raise ValueError(f"--passes is for {MULTISTEP_STUDENT} at one --cfg, without ranges of calls or image levels.")

    def config(calls: int) -> PredictorConfig:
        return _asked(arguments, models, scales, calls)

    def settings(calls: int) -> FitConfig:
        return cast(FitConfig, _settings(arguments, config(calls), models[0]))

    return make_passes(arguments.passes, config, settings, sources[0], **about)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The arguments of these names that were not left out."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _uses(arguments: argparse.Namespace) -> list[Use]:
    """What a set is for; empty for one predictor. Raises ValueError for a sampler that has no sets."""
    uses = [Use(calls, level) for level in (0.0, *arguments.image_levels) for calls in arguments.calls]
    if len(uses) > 1 and arguments.solver != MULTISTEP_STUDENT:
        raise ValueError(f"Only {MULTISTEP_STUDENT} is fitted for several uses: give one number of calls.")
    return uses if len(uses) > 1 else []


def _asked(
    arguments: argparse.Namespace, models: Sequence[Model], scales: Sequence[float | None], calls: int
) -> PredictorConfig:
    """The settings of what the arguments ask to fit, for so many calls."""
    chosen = given(arguments, SHAPING)
    several = tuple(scale for scale in scales if scale is not None) if len(models) > 1 else ()
    facts = [facts_of(model) for model in models]
    guided, about_model = all(one.guided for one in facts), fingerprint_of(arguments.denoiser, models[0])
    about = replace(facts[0], guided=guided, fingerprint=about_model)
    told: dict[str, Any] = {"guidance": 1.0 if scales[0] is None else scales[0], "guidances": several}
    switches = ("table", "published", "thresholding", "no_lower_order_final")
    if arguments.solver == MULTISTEP_STUDENT:
        if refused := [*chosen, *(name for name in switches if getattr(arguments, name))]:
            options = ", ".join("--" + name.replace("_", "-") for name in refused)
            raise ValueError(f"{MULTISTEP_STUDENT} finds its own grid and weights: leave out {options}.")
        return student_config(MULTISTEP_STUDENT, calls, about, **told)
    if arguments.table and arguments.published:
        raise ValueError("A table is not the paper's: leave out --table or --published.")
    if several and not arguments.table:
        raise ValueError(
            "The paper's network knows one guidance scale: add --table, fit amed_multistep, or leave one --cfg."
        )
    if chosen.get("schedule") == SEARCHED:  # which takes a model: later
        chosen.pop("schedule")
    chosen |= {"thresholding": arguments.thresholding, "lower_order_final": not arguments.no_lower_order_final}
    kind: Kind = "table" if arguments.table else "network"
    return student_config(arguments.solver, calls, about, published=arguments.published, kind=kind, **told, **chosen)


def _settings(arguments: argparse.Namespace, config: PredictorConfig, model: Model) -> TrainConfig | FitConfig:
    """How to fit it."""
    about = {"effort": arguments.effort, "differentiable": is_differentiable(model)}
    usual = usual_settings(config, arguments.trajectories, **about)
    return replace(usual, **given(arguments, TRAINING if isinstance(usual, TrainConfig) else ["batch_size"]))


def run_sample(arguments: argparse.Namespace) -> None:
    """Draw samples and save them. Raises ValueError for a predictor of another model, or an output that cannot be."""
    from .plots import save_samples  # noqa: PLC0415 - needs Pillow

    predictor = load_predictor(arguments.predictor)
    made_for = None if predictor.config.guidance == 1 else predictor.config.guidance
    cfg = made_for if arguments.cfg is None else arguments.cfg
    model = load_denoiser(arguments.denoiser, cfg)
    check_model(predictor, arguments.denoiser, model)
    method = method_of(predictor, "amed", cfg)
    generator = torch.Generator().manual_seed(arguments.seed)
    x = method.sigmas[0] * torch.randn(arguments.samples, *model.shape, generator=generator)
    drawn = []
    for rows in tqdm(list(chunks(arguments.samples, arguments.batch)), unit="batch"):
        drawn.append(sample(conditioned(model, rows), x[rows.start : rows.stop], method))
    samples, decode = torch.cat(drawn), getattr(model, "images", None)
    if decode is not None and arguments.output.suffix == ".png":
        samples = torch.cat([decode(samples[n : n + 1]) for n in range(len(samples))])
    save_samples(samples, arguments.output)
    print(f"{arguments.output}: {arguments.samples} samples in {predictor.config.calls} model calls each")


def run_bench(arguments: argparse.Namespace) -> None:
    """Print the table, and save its rows if asked to."""
    model = load_denoiser(arguments.denoiser, arguments.cfg)
    about = given(arguments, ("samples", "trajectories", "teacher_calls", "batch", "seed"))
    settings = BenchSettings(calls=tuple(arguments.calls), methods=tuple(arguments.methods), **about)
    rows = bench_with_bar(model, settings)
    print(table(best_of_each(rows) if arguments.best else rows))
    if arguments.json:
        write_json(arguments.json, as_json(rows))


def run_first(arguments: argparse.Namespace) -> None:
    """Print what the first pictures teach; rows are saved as they come."""
    model = load_denoiser(arguments.denoiser, arguments.cfg)
    rows = []
    with tqdm(unit="draw") as bar:
        about = given(arguments, ("calls", "pictures", "draws", "samples", "uses", "teacher_calls", "batch", "seed"))
        for row in first.first(model, **about, progress=lambda text: bar.update()):
            rows.append(row)
            if arguments.json:
                write_json(arguments.json, as_json(rows))
    print(first.table(rows))


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print what a file holds."""
    predictor = load_predictor(arguments.file)
    config = predictor.config
    print(f"{arguments.file}: {sum(p.numel() for p in predictor.parameters()):,} weights")
    print(f"model calls: {config.calls} ({config.planned} planned intervals of {config.intervals})")
    print(f"passes of the network: {config.passes}")
    for name, value in vars(config).items():
        print(f"  {name}: {json.dumps(value)}")
    print(predictor.text())
    print("notes:", json.dumps(read_notes(arguments.file), indent=1))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m amed_core", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    def model_options(to: argparse.ArgumentParser, several: bool = False) -> None:
        to.add_argument(
            "--denoiser",
            default="digits",
            help='"digits" or "pictures" (bundled), or FILE.py:NAME, where NAME() returns an object with __call__(x, '
            "sigma) -> denoised or (denoised, features), shape (without the batch), sigma_min, sigma_max and, "
            "optionally, data(n) that returns n real samples, and images(samples) that decodes latents",
        )
        scale = "guidance scale, for denoisers whose NAME takes a cfg"
        if several:
            to.add_argument("--cfg", type=float, nargs="+", help=scale + "; a table takes several, rising")
        else:
            to.add_argument("--cfg", type=float, help=scale + "; a predictor's own where one is given")
        to.add_argument("--seed", type=int, default=0)

    demo = command("demo", run_demo, "Fit the default predictor to the bundled text-to-picture model, and compare.")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for picture, table and predictor")
    demo.add_argument("--samples", type=int, default=48, help="evaluation noises, at least 12")
    demo.add_argument("--trajectories", type=int, default=0, help="training noises; 0: as many as usual")

    train = command("train", run_train, "Train a predictor and save it.")
    model_options(train, several=True)
    _train_options(train)

    draw = command("sample", run_sample, "Sample with a predictor.")
    model_options(draw)
    draw.add_argument("--predictor", type=Path, required=True)
    draw.add_argument("--samples", type=int, default=100)
    draw.add_argument("--batch", type=int, default=250, help="samples per model call")
    draw.add_argument("--output", type=Path, default=Path("samples.png"), help=".png of images, or .safetensors")

    compare = command("bench", run_bench, "Compare methods at equal true model calls, on noise no fit has seen.")
    model_options(compare)
    compare.add_argument("--calls", type=int, nargs="+", default=[3, 5, 7], help="model calls per sample")
    compare.add_argument("--samples", type=int, default=1000, help="evaluation noises; all work grows with it")
    compare.add_argument("--trajectories", type=int, default=0, help="of every fit; 0: twice the samples, up to 10000")
    compare.add_argument("--teacher-calls", type=int, default=200, help="model calls of the converged teacher")
    compare.add_argument("--batch", type=int, default=250, help="samples per model call")
    compare.add_argument("--methods", nargs="+", default=["*"], help="shell patterns of method names")
    compare.add_argument("--best", action="store_true", help="print only the best row of every unlearned solver")
    compare.add_argument("--json", type=Path, help="file for the rows")

    teach = command("first", run_first, "What the first pictures teach, over the best stock pair at equal calls.")
    model_options(teach)
    teach.add_argument("--calls", type=int, nargs="+", default=[5, 8], help="model calls per picture")
    teach.add_argument("--pictures", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of pictures learned from")
    teach.add_argument("--draws", type=int, default=5, help="how often to begin anew, with other pictures")
    teach.add_argument("--samples", type=int, default=100, help="other pictures, that judge")
    uses: dict[str, Any] = {"nargs": "+", "default": first.USE_NAMES, "choices": first.USE_NAMES}
    teach.add_argument("--uses", **uses, help="where pictures start")
    teach.add_argument("--teacher-calls", type=int, default=24, help="of the slow sampler that is learned from")
    teach.add_argument("--batch", type=int, default=100, help="samples per model call in evaluation")
    teach.add_argument("--json", type=Path, help="file for the rows")

    show = command("inspect", run_inspect, "Show what a predictor file holds.")
    show.add_argument("file", type=Path)
    return top


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--solver", default="amed", choices=NAMES, help="what to fit")
    train.add_argument("--table", action="store_true", help="constants per interval in place of the paper's network")
    train.add_argument("--published", action="store_true", help="the paper's grid and ending, not the best measured")
    train.add_argument("--calls", default="5", help="model calls per sample; of amed_multistep also a range, as 3-10")
    train.add_argument(
        "--image-levels", nargs="*", type=float, default=[], help="noise levels where images start, of amed_multistep"
    )
    train.add_argument(
        "--trajectories",
        type=int,
        default=0,
        help="training noises; 0: 10000 of a network, 32 of a table, as many as the effort says of amed_multistep",
    )
    train.add_argument(
        "--passes",
        type=int,
        default=0,
        help="of amed_multistep: passes of the network, two for a guided call, for which it chooses --calls",
    )
    train.add_argument("--effort", choices=EFFORTS, default="standard", help="what amed_multistep may cost")
    train.add_argument("--epochs", type=int, default=1, help="how often a network crosses them; the teacher does once")
    train.add_argument("--held-out", type=int, default=0, help="noises on which a network's best weights are chosen")
    train.add_argument("--gradient", choices=GRADIENTS, help="through the model; if left out, reverse where possible")
    train.add_argument("--batch-size", type=int, help="noises per model call; 4 to 32 if left out")
    train.add_argument("--learning-rate", type=float, default=5e-3, help="of Adam")
    train.add_argument("--schedule", choices=[*SCHEDULES, SEARCHED], help="of the grid; the recipe's if left out")
    train.add_argument("--rho", type=float, help="of the schedule; its usual one if left out")
    train.add_argument("--scale-dir", type=float, help="half-width around 1; the recipe's if left out")
    train.add_argument("--scale-time", type=float, help="half-width around 1; the recipe's if left out")
    train.add_argument("--max-order", type=int, help="of iPNDM and DPM-Solver++; the recipe's if left out")
    train.add_argument("--prediction", choices=["data", "noise"], help="of DPM-Solver++; data if left out")
    train.add_argument("--thresholding", action="store_true", help="DPM-Solver++'s dynamic thresholding: pixel models")
    train.add_argument("--no-lower-order-final", action="store_true", help="keep DPM-Solver++'s order to the end")
    train.add_argument("--hidden", type=int, help="hidden width of the predictor; 128 if left out")
    train.add_argument("--teacher", choices=list(TEACHERS), help="the student's own family if left out")
    train.add_argument("--teacher-points", type=int, default=0, help="that it adds in every interval; 0: recipe's")
    train.add_argument("--output", type=Path, default=Path("predictor.safetensors"))
    train.add_argument("--state", type=Path, help="file for the training state, written at Ctrl-C and at the end")
    train.add_argument("--resume", type=Path, help="go on from a training state")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; user errors are one line on stderr and exit code 2."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"amed_core: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("amed_core: stopped", file=sys.stderr)
        return 130
    return 0
