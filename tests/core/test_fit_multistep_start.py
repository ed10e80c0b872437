"""Fits of multistep tables: what they reach, what they cost, and that they can be stopped, split and resumed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from amed_core.fit.multistep_fit import MultistepFit
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture
from torch import Tensor

from amed_core import sample
from amed_core.call_list import read
from amed_core.config import PredictorConfig
from amed_core.files import load_state, save_state
from amed_core.fit import multistep_fit
from amed_core.fit.baselines import starts
from amed_core.fit.huber import compared, far
from amed_core.fit.multistep_start import Beginning
from amed_core.fit.protocol import FitConfig
from amed_core.fit.trajectories import HELD_OUT, gaussian
from amed_core.multistep import MultistepTable
from amed_core.samplers import multistep_student
from amed_core.spectrum import bands, from_spectrum, spectrum
from amed_core.types import Denoiser

SHAPE = (1, 4, 4)
SMALL = FitConfig(trajectories=16, held_out=8, batch_size=4, teacher_calls=20, iterations=4)
CONFIG = multistep_student(4, SIGMA_MIN, SIGMA_MAX)
STARTS = starts(4, SIGMA_MIN, SIGMA_MAX)
SCALES = (1.0, 2.0)


def fit(
    config: FitConfig = SMALL, denoiser: Denoiser = mixture, settings: PredictorConfig = CONFIG, **more: Any
) -> MultistepFit:
    sources = more.pop("sources", gaussian(denoiser, SHAPE, SIGMA_MAX))
    return MultistepFit(MultistepTable(settings), sources, config, more.pop("begin", STARTS), **more)


def guided(scale: float) -> Denoiser:
    """A model whose answer depends on a guidance scale."""
    return lambda x, sigma: mixture(x, sigma)[0] * (1 + 0.05 * scale / (1 + sigma))


def numbers(table: MultistepTable) -> Tensor:
    values = (torch.tensor(table.config.sigmas), table.weights, table.first, table.scale_time)
    return torch.cat([value.flatten() for value in values])


def test_it_comes_nearer_than_every_unlearned_solver() -> None:
    fitting = fit()
    events = list(fitting.events())
    assert all(after.error <= before.error for before, after in pairwise(events))
    summary = fitting.summary()
    assert summary["error"] < 0.5 * summary["base_solver_error"]
    assert 0.5 * events[0].held_out < summary["base_solver_error"] <= events[0].held_out, "odd samples count less"
    assert summary["gain"] == pytest.approx(1 - summary["error"] / summary["base_solver_error"])


def test_one_odd_sample_that_is_held_out_does_not_choose_the_table() -> None:
    """One of the samples that are held out ends elsewhere, whatever one does, and the start is lucky with it."""

    def source(rows: range) -> tuple[Tensor, Denoiser]:
        x, _ = gaussian(mixture, SHAPE, SIGMA_MAX)(rows)
        odd = torch.tensor([row == HELD_OUT for row in rows])[:, None, None, None]

        def answer(x: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
            usual = mixture(x, sigma)[0]
            return torch.where(odd, usual + 0.6 * torch.sin(300 * sigma.log()), usual), None

        return x, answer

    fitting = fit(replace(SMALL, iterations=1, held_out=16), sources=source)
    events = list(fitting.events())
    assert events[-1].held_out > events[0].held_out, "or the RMSE would have chosen as well"
    assert events[-1].error < 0.01 * events[0].error
    assert (numbers(fitting.predictor) == numbers(fitting.current)).all()
    assert fitting.summary()["gain"] > 0


def test_beyond_some_distance_errors_count_linearly() -> None:
    """Huber's loss, for which the usual distance is 1 and the limit 3: 9 odd samples in 10 times the distance."""
    usual = torch.ones(1, 999, dtype=torch.float64)
    for odd, loss in ((2.0, 4.0), (30.0, 3 * (2 * 30 - 3))):
        distances = torch.cat([usual, torch.tensor([[odd]])], 1)
        limit = float(far(distances))
        assert limit == pytest.approx(3 * odd ** (1 / 1000))
        expected = (999 + (loss if odd < limit else limit * (2 * odd - limit))) / 1000
        assert compared(distances, torch.ones_like(distances)) == pytest.approx(expected, rel=1e-2)
    assert compared(usual, usual) == 1
    assert compared(usual, 2 * usual) == pytest.approx(0.25)
    assert compared(torch.full_like(usual, torch.inf), usual) > 1e300


def test_with_many_calls_a_part_of_every_batch_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of a batch costs 26 calls for derivatives and 4 to run it once more."""
    fitting = fit()
    whole = fitting.calls_of(3) - fitting.calls_of(2)
    monkeypatch.setattr(multistep_fit, "SPENT", 100)
    monkeypatch.setattr(multistep_fit.MultistepFit, "_due", lambda *_: {0, 1, 2, 3})
    events = list(fitting.events())
    attempt = 4 * (SMALL.trajectories + SMALL.held_out)
    assert fitting.calls_of(3) - fitting.calls_of(2) == 12 * (26 + 4) + attempt
    assert whole == 16 * 26 + attempt
    assert events[-1].error < events[1].error


def test_on_a_gaussian_it_is_exact() -> None:
    fitting = fit(replace(SMALL, teacher_calls=100), Gaussian())
    events = list(fitting.events())
    assert events[-1].held_out < 1e-3 * max(1.0, events[0].held_out)


def test_where_nothing_is_gained_on_what_is_held_out_it_stays_with_its_start() -> None:
    """The trajectories that are held out are those of another model."""

    def another(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x, 3 * sigma)[0]

    def source(rows: range) -> Any:
        return gaussian(another if rows.start >= 2**40 else mixture, SHAPE, SIGMA_MAX)(rows)

    fitting = fit(sources=source)
    events = list(fitting.events())
    assert min(event.held_out for event in events) == events[0].held_out, "or the test shows nothing"
    assert fitting.summary()["gain"] == 0
    (start,) = [s for s in STARTS if s.name == fitting.start] or [None]
    if start is not None:
        assert fitting.predictor.config.sigmas == start.levels
    assert (fitting.predictor.scale_time == 1).all()


def test_no_model_call_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted calls are those on paper, but for attempts that failed."""
    monkeypatch.setattr(multistep_fit, "SPENT", 250)
    made = 0

    def counting(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal made
        made += len(x)
        return mixture(x, sigma)

    # 4 calls: weights 3 + 2 * 2 + 3 * 1, first 3 + 2 + 1, told levels 4 + 3 + 2 + 1, for two batches of 4, and for
    # four in the first iteration.
    fitting = fit(denoiser=counting)
    counts = [event.model_calls for event in fitting.events()]
    assert counts[-1] == made
    derivatives, trial, judged = 26 * 4 * 2, 4 * SMALL.trajectories, 4 * SMALL.held_out
    for number, (before, after) in enumerate(pairwise(counts[1:])):
        expansions = derivatives * (2 if number == 0 else 1)
        assert (after - before - expansions - judged) in [trial * attempts for attempts in range(1, 6)]
        assert fitting.calls_of(number + 2) - fitting.calls_of(number + 1) == expansions + trial + judged
    assert fitting.calls_of(1) == counts[1]


def test_it_stops_before_its_budget_is_exceeded() -> None:
    unlimited = [event.model_calls for event in fit().events()]
    budget = unlimited[1] + 1
    limited = fit(replace(SMALL, budget=budget))
    list(limited.events())
    assert limited.model_calls <= budget
    assert limited.iteration < len(unlimited) - 1


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_fit_that_was_stopped_goes_on_as_if_it_was_not(tmp_path: Path, stop: int) -> None:
    whole = fit()
    list(whole.events())
    part = fit()
    for count, _ in enumerate(part.events(), 1):
        if count == stop:
            break
    save_state(tmp_path / "state.safetensors", part.state_dict())
    rest = fit()
    rest.load_state_dict(load_state(tmp_path / "state.safetensors"))
    list(rest.events())
    assert (numbers(rest.predictor) == numbers(whole.predictor)).all()
    assert rest.history == whole.history
    assert rest.summary()["error"] == whole.summary()["error"]


def test_a_state_of_another_fit_is_refused() -> None:
    state = fit().state_dict()
    with pytest.raises(ValueError, match="trajectories"):
        fit(replace(SMALL, trajectories=8)).load_state_dict(state)
    with pytest.raises(ValueError, match="other starts"):
        fit(begin=STARTS[:3]).load_state_dict(state)


def test_guidance_scales_share_the_grid_and_no_weights() -> None:
    settings = replace(CONFIG, guidance=SCALES[0], guidances=SCALES)
    sources = [gaussian(guided(scale), SHAPE, SIGMA_MAX) for scale in SCALES]
    fitting = fit(settings=settings, sources=sources)
    list(fitting.events())
    assert fitting.summary()["error"] < 0.7 * fitting.summary()["base_solver_error"]
    one, other = fitting.predictor.alone()
    assert one.config.sigmas == other.config.sigmas
    assert float((one.weights - other.weights).abs().max()) > 1e-3


def test_the_same_seed_gives_the_same_table() -> None:
    tables = []
    for _ in range(2):
        fitting = fit(replace(SMALL, iterations=2))
        list(fitting.events())
        tables.append(numbers(fitting.predictor))
    assert (tables[0] == tables[1]).all()


def test_one_trajectory_is_enough_not_to_explode() -> None:
    fitting = fit(replace(SMALL, trajectories=1, batch_size=1))
    list(fitting.events())
    assert fitting.summary()["error"] <= fitting.summary()["base_solver_error"]


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="without autograd"):
        fit(replace(SMALL, gradient="reverse"))
    with pytest.raises(ValueError, match="2 sources"):
        fit(sources=[gaussian(mixture, SHAPE, SIGMA_MAX)] * 2)
    with pytest.raises(FloatingPointError, match="pictures are not finite"):
        list(fit(denoiser=lambda x, sigma: x * float("nan")).events())


class Smooth:
    """Two Gaussians of smooth pictures about a picture and its negative; guided toward the first."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        picture = torch.linspace(-1, 1, 16)
        self.mean = spectrum((picture[:, None] * picture - 0.3 * picture)[None, None].double())

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        coefficients, mean = spectrum(x), self.mean.to(x)
        variance = (2.0 * 0.5 ** bands(x) + 0.01).to(x)
        total = variance + sigma**2

        def about(mean: Tensor) -> Tensor:
            return mean + variance / total * (coefficients - mean)

        first = (2 * (coefficients * mean / total).flatten(1).sum(1)).sigmoid().reshape(-1, 1, 1, 1)
        cond, uncond = from_spectrum(about(mean)), from_spectrum(first * about(mean) + (1 - first) * about(-mean))
        return uncond + self.scale * (cond - uncond), None, cond - uncond


@pytest.mark.parametrize("left_out", ["first step", "bands"])
def test_the_parts_of_a_fit_bring_it_nearer(left_out: Any) -> None:
    """Few calls, of which none is spent where the data is Gaussian, and none of whose steps takes all bands alike."""
    source, begin = gaussian(Smooth(3.0), (1, 16, 16), SIGMA_MAX), starts(3, SIGMA_MIN, SIGMA_MAX)
    config = replace(SMALL, trajectories=24, held_out=16, batch_size=8, iterations=3)
    errors = []
    for without in ([], [left_out]):
        settings = multistep_student(3, SIGMA_MIN, SIGMA_MAX, guided=True)
        fitting = MultistepFit(MultistepTable(settings), source, config, begin, without=without)
        *_, last = fitting.events()
        found = fitting.current.config
        assert (found.guided, found.spectral) == (True, "bands" not in without)
        assert bool(found.first_sigma) == ("first step" not in without)
        errors.append(last.held_out)
    assert errors[0] < 0.6 * errors[1]


def test_a_sample_without_frequencies_is_fitted_without_bands_or_first_step() -> None:
    def packed(rows: range) -> tuple[Tensor, Denoiser]:
        x, _ = gaussian(mixture, (1, 16), SIGMA_MAX)(rows)
        return x, lambda x, sigma: mixture(x[:, None], sigma[..., None] if sigma.ndim else sigma)[0][:, 0]

    fitting = fit(sources=packed)
    list(fitting.events())
    config = fitting.predictor.config
    assert (config.spectral, config.first_sigma, config.channels) == (False, 0.0, 0)
    assert fitting.summary()["gain"] > 0.5


def test_a_fit_that_goes_on_from_an_unlearned_solver_has_no_bands_to_polish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the closed form gains nothing, iterations start from a table without bands, and may well gain."""
    monkeypatch.setattr(Beginning, "solved", lambda self, best, listed, paths: best)
    fitting = fit()
    events = list(fitting.events())
    assert fitting.beginning.bands
    assert not fitting.current.config.spectral
    assert events[-1].error < 0.9 * events[1].error, "some iteration gained"


def test_a_refused_polish_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way stays the table that the distances and the kept runs belong to."""
    fitting = fit()
    next(events := fitting.events())
    next(events)
    assert fitting.current.config.spectral
    before, distances = {n: v.clone() for n, v in fitting.current.learned.items()}, fitting.distances.clone()
    monkeypatch.setattr(multistep_fit, "compared", lambda *_: 2.0)
    fitting._polish()
    assert all((value == before[name]).all() for name, value in fitting.current.learned.items())
    runs: dict[int, Any] = {}
    assert (fitting.on.distances(fitting.current, runs) == distances).all()


@pytest.mark.parametrize("settings", [CONFIG, replace(CONFIG, guidances=SCALES)])
def test_tables_of_single_guidance_scales_are_copies(settings: PredictorConfig) -> None:
    table = MultistepTable(settings)
    for single in table.alone():
        single.weights.add_(1.0)
        assert (table.weights - single.weights).abs().max() == 1.0


def test_what_two_models_share_a_run_or_take_one_each_is_the_same() -> None:
    """Below a level another model answers: no step of its own knows the first one's answers, so that its part of the
    run may be a run of its own, and the whole is nearer to the teacher than every solver that restarts there.
    """
    switch = 2.0

    def two(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x, sigma)[0] if float(sigma.max()) >= switch else 0.9 * mixture(x, sigma)[0] + 0.05

    settings = replace(CONFIG, switch_sigma=switch, guidances=())
    begin = starts(4, SIGMA_MIN, SIGMA_MAX, switch_sigma=switch)
    fitting = fit(denoiser=two, settings=settings, begin=begin)
    list(fitting.events())
    summary, table = fitting.summary(), fitting.predictor
    assert summary["error"] < 0.7 * summary["base_solver_error"]
    sigmas, at = table.config.sigmas, table.config.switch
    assert sigmas[at - 1] >= switch > sigmas[at]
    assert (table.weights[at:, :at] == 0).all()

    def run(x: Tensor, levels: tuple[float, ...]) -> Tensor:
        grid = torch.tensor(levels, dtype=torch.float64)
        return sample(two, x, grid, table.solver(levels), table.planner(levels))

    x = gaussian(two, SHAPE, SIGMA_MAX)(range(HELD_OUT, HELD_OUT + 4))[0].double()
    whole = run(x, sigmas)
    torch.testing.assert_close(run(run(x, sigmas[: at + 1]), sigmas[at:]), whole, rtol=1e-12, atol=1e-12)
    assert read(sigmas[at:], table.config).own_grid
    assert not read(sigmas[at - 1 :], table.config).own_grid, "it begins with the first model's last call"
