"""Sampling runs toward the targets of a fit, kept and resumed."""

from dataclasses import replace

import pytest
import torch
from problems import SHAPE, SIGMA_MAX, SMALL, X, end_to_end_fit, midpoint_config, mixture, multistep_config, same

from amed_core import build, sample, trajectory
from amed_core.fit.runs import RunCache, Runs, bytes_of, moved_to
from amed_core.fit.trajectories import HELD_OUT, Metered, gaussian
from amed_core.fit.workers import ALONE

STEPS = list(trajectory(mixture, X, build(midpoint_config("amed_ipndm")).method()))


def test_a_moved_run_is_the_same_and_shares_what_it_shared() -> None:
    moved = moved_to(STEPS, "cpu")
    for step, other in zip(STEPS, moved, strict=True):
        assert (step.x == other.x).all()
        assert (step.start.denoised == other.start.denoised).all()
    assert moved[1].history[-1] is moved[1].mid
    assert bytes_of(moved) == bytes_of(STEPS)


def test_the_memory_of_a_run_is_that_of_its_samples_answers_and_features() -> None:
    calls = sum(step.model_calls for step in STEPS)
    each, features = X.numel() * X.element_size(), X.element_size() * 64 * len(X)
    # A sample that is carried into the next call is one with it; only the last leads to none.
    most = (2 * calls + len(STEPS)) * each + calls * features
    assert (2 * calls) * each + calls * features <= bytes_of(STEPS) <= most


def test_runs_are_kept_as_long_as_there_is_room() -> None:
    cache, size = RunCache(2 * bytes_of(STEPS)), bytes_of(STEPS)
    for number in range(3):
        cache.put(number, STEPS)
    assert cache.bytes == 2 * size
    assert [len(cache.get(number, torch.device("cpu"))) for number in range(3)] == [len(STEPS), len(STEPS), 0]


def test_fitted_and_held_out_trajectories_are_others_and_distances_are_those_of_samples() -> None:
    config = midpoint_config()
    runs = Runs.of(config, SMALL, Metered(gaussian(mixture, SHAPE, SIGMA_MAX)), ALONE)
    assert runs.fitted.rows == range(SMALL.trajectories)
    assert runs.judged.rows == range(HELD_OUT, HELD_OUT + SMALL.held_out)
    method = build(config).method()
    distances, cache = runs.fitted_distances(method)
    for target in runs.fitted:
        end = sample(target.denoiser, target.x, method)
        expected = (end - target.end).square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(distances[target.rows.start : target.rows.stop].float(), expected)
        assert (cache.get(target.number, torch.device("cpu"))[-1].x == end).all()


def test_runs_that_are_not_kept_are_run_again_to_the_same_end() -> None:
    kept, again = (end_to_end_fit(midpoint_config(), replace(SMALL, keep_bytes=size)) for size in (2**30, 0))
    for fit in (kept, again):
        list(fit.events())
    assert same(kept.predictor, again.predictor)
    assert kept.model_calls < again.model_calls


def test_runs_with_other_ends_share_all_else() -> None:
    cache, other = RunCache(2**30), torch.zeros_like(STEPS[-1].x)
    cache.put(3, STEPS)
    made = cache.ended({3: other})
    assert (made.steps[3][-1].x == other).all()
    assert (cache.steps[3][-1].x == STEPS[-1].x).all()
    assert all(one.start is same.start for one, same in zip(made.steps[3], cache.steps[3], strict=True))


def test_runs_that_wait_are_as_many_as_there_is_room_for() -> None:
    cache, size = RunCache(2**30), bytes_of(STEPS)
    for number in range(3):
        cache.put(number, STEPS)
    assert cache.within(3 * size) is cache
    assert list(cache.within(3 * size - 1).steps) == [0, 1]
    assert not cache.within(0).steps


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("others", [0, 1, 2, 8])
@pytest.mark.parametrize("below", [False, True])
def test_all_that_fits_keep_is_within_what_they_may(scales: int, others: int, below: bool) -> None:
    settings = replace(SMALL, keep_bytes=2**30)
    source = Metered(gaussian(mixture, SHAPE, SIGMA_MAX))
    runs = Runs.of(multistep_config(3), settings, source, ALONE, scales=scales, others=others, below=below)
    paths = runs.fitted.path_bytes
    if below:  # the held-out ones, and both again below a level
        paths = 2 * (paths + runs.judged.path_bytes)
    paths *= scales if others else 1  # else each scale begins when the one before it is done
    _, cache = runs.fitted_distances(build(midpoint_config()).method())
    waiting = others * runs.waiting_bytes
    assert 0.99 * 2**30 <= paths + 2 * cache.keep_bytes + (waiting or 2**30 / 8) <= 2**30


def test_a_fit_that_is_alone_forgets_the_teachers_paths_once_it_has_begun() -> None:
    config = multistep_config(3)
    for others in (0, 2):
        source = Metered(gaussian(mixture, SHAPE, SIGMA_MAX))
        runs = Runs.of(config, SMALL, source, ALONE, others=others)
        runs.fitted.taught()
        runs.begun()
        assert bool(runs.fitted.paths) is bool(others)
