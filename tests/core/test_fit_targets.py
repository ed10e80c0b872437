"""Where trajectories should end."""

import pytest
import torch
from problems import SHAPE, SIGMA_MAX, SIGMA_MIN, Counting, mixture, multistep_config

from amed_core import FitConfig
from amed_core.fit.runs import Runs
from amed_core.fit.targets import STATE_BYTES, Target, Targets, rmse
from amed_core.fit.teacher import Converged, Heun, Teacher, path, path_bytes
from amed_core.fit.trajectories import Metered, gaussian
from amed_core.fit.workers import ALONE, Workers
from amed_core.types import Denoiser, Sample

X = torch.zeros(4, *SHAPE)
SLOW = Converged(SIGMA_MIN, SIGMA_MAX, 9)


def targets(
    rows: range, workers: Workers | None = None, denoiser: Denoiser = mixture, teacher: Teacher = SLOW
) -> Targets:
    source = Metered(gaussian(denoiser, SHAPE, SIGMA_MAX))
    return Targets(source, rows, 4, teacher, workers or Workers())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [range(10), range(7, 30), range(1)])
def test_workers_share_trajectories_and_none_has_parts_of_two_batches(rows: range, count: int) -> None:
    shared = [targets(rows, Workers(rank, count)).batches() for rank in range(count)]
    assert [row for batches in shared for batch in batches for row in batch] == list(rows)
    for batch in (batch for batches in shared for batch in batches):
        first, last = ((row - rows.start) // 4 for row in (batch[0], batch[-1]))
        assert first == last


@pytest.mark.parametrize("teacher", [SLOW, Heun(SIGMA_MIN, SIGMA_MAX, 9)], ids=["ipndm", "heun"])
def test_the_slow_sampler_runs_once_and_takes_the_calls_it_says(teacher: Teacher) -> None:
    model = Counting(mixture)
    found = targets(range(10), denoiser=model, teacher=teacher)
    first = [target.end for target in found]
    again = [target.end for target in found]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert model.samples == found.source.calls == found.model_calls


def test_targets_are_where_the_slow_sampler_leads() -> None:
    for target in targets(range(3, 9)):
        expected = path(mixture, target.x, SLOW.grid).end
        assert (target.end == expected).all()


def test_the_first_of_a_batch_are_the_same_trajectories() -> None:
    found = targets(range(8))
    whole = next(iter(found))
    few = whole.few(found.source, 2)
    assert (few.x == whole.x[:2]).all()
    assert (few.end == whole.end[:2]).all()
    assert few.rows == range(2)


def test_distances_are_every_samples_own_and_infinite_where_it_is_not_finite() -> None:
    def off(target: Target) -> Sample:
        size = torch.tensor([float(row) for row in target.rows]).reshape(-1, 1, 1, 1)
        return target.end + torch.where(size == 6, torch.nan, size)

    found = targets(range(8)).distances(off)
    assert found.tolist() == pytest.approx([0, 1, 2, 3, 4, 5, float("inf"), 7], abs=1e-4)
    assert rmse(found[:3]) == pytest.approx((5 / 3) ** 0.5, abs=1e-4)
    few = targets(range(8)).distances(off, count=3)
    torch.testing.assert_close(few, found[:4])


def test_a_slow_sampler_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="pictures are not finite"):
        next(iter(targets(range(4), denoiser=lambda x, sigma: x * float("nan"))))


def test_a_states_ends_are_read_only_if_they_are_of_these_trajectories() -> None:
    found = targets(range(10))
    list(found)
    assert all((end == found.ends[number]).all() for number, end in found.read(found.state_dict(), SHAPE).items())
    for damaged in ({"0": torch.zeros(3, *SHAPE)}, {"0": torch.zeros(4, 2, 4, 4)}, {"0": 1.0}):
        with pytest.raises(TypeError, match="was expected"):
            found.read(damaged, SHAPE)
    with pytest.raises(KeyError):
        found.read({"3": torch.zeros(4, *SHAPE)}, SHAPE)


def test_paths_take_no_more_memory_than_they_may_and_at_least_one_is_there() -> None:
    each, everything = path_bytes(X[:1], SLOW.calls, half=False), targets(range(10))
    everything.path_bytes = 10 * each
    assert [len(path.end) for path in everything.taught().values()] == [4, 4, 2]
    assert all(path.last is None for path in everything.paths.values()), "in full precision, as there is room"
    for room, counts in ((10 * each - 1, [4, 4, 2]), (3 * each, [4, 2]), (2 * each, [4]), (each, [2]), (0, [1])):
        found = targets(range(10))
        found.path_bytes = room
        assert [len(path.end) for path in found.taught().values()] == counts
        assert sum(path.bytes for path in found.paths.values()) <= max(room, each / 2)
        assert all(path.last is not None for path in found.paths.values()), "in half precision"
        assert all((one.end == other.end).all() for one, other in zip(found, everything, strict=True))


def test_targets_hold_no_memory_of_paths() -> None:
    found = targets(range(8))
    found.path_bytes = 2**20
    found.taught()
    for end in found.ends.values():
        assert end.untyped_storage().nbytes() == end.numel() * end.element_size()


@pytest.mark.parametrize(("trajectories", "held_out"), [(16, 8), (64, 32), (96, 32)])
@pytest.mark.parametrize("scales", [1, 3])
def test_a_state_holds_less_than_500_mb_of_the_largest_videos(trajectories: int, held_out: int, scales: int) -> None:
    settings = FitConfig(trajectories, held_out, batch_size=4)
    runs = Runs.of(multistep_config(3), settings, Metered(gaussian(mixture, SHAPE, SIGMA_MAX)), ALONE, scales=scales)
    held = 0
    for found in (runs.fitted, runs.judged):
        ends = {str(n): torch.zeros(1).expand(len(rows), 16, 21, 90, 160) for n, rows in enumerate(found.batches())}
        found.ends = ends  # of no memory, as all values are one
        kept = found.state_dict()
        assert kept or scales > 1, "some are there"
        held += sum(end.numel() * end.element_size() for end in kept.values())
    assert scales * held <= STATE_BYTES < 500e6
