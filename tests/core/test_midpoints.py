"""Plans of midpoints: tables, and which plan serves which interval."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from problems import SHAPE, SIGMA_MAX, SIGMA_MIN, end_to_end_fit, evaluation, midpoint_config, mixture, noise

from amed_core import MidpointTable, PredictorConfig, load_predictor, polynomial, sample, save_predictor
from amed_core.midpoints import neighbours
from amed_core.samplers import TYPES

PLANNED = PredictorConfig("amed", tuple(polynomial(4, SIGMA_MIN, SIGMA_MAX).tolist()), SIGMA_MIN, SIGMA_MAX)
SCALES = (1.0, 2.0, 4.0)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("calls", [4, 5])
def test_a_new_table_is_the_base_solver_with_its_midpoints_at_half(name: str, calls: int) -> None:
    table, x = MidpointTable(midpoint_config(name, calls)), SIGMA_MAX * noise(3, *SHAPE)
    torch.testing.assert_close(sample(mixture, x, table.method()), sample(mixture, x, table.config.base_method()))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    fit = end_to_end_fit(midpoint_config("amed_dpmpp_2m"))
    list(fit.events())
    save_predictor(fit.predictor, tmp_path / "table.safetensors")
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, MidpointTable)
    assert isinstance(fit.predictor, MidpointTable)
    assert loaded.config == fit.predictor.config
    assert (loaded.plans == fit.predictor.plans).all()


def test_between_guidance_scales_it_interpolates_and_beyond_them_it_stays() -> None:
    table = MidpointTable(midpoint_config(guidances=SCALES, guidance=SCALES[0]))
    table.plans[:, 0, 0] = torch.tensor([0.2, 0.4, 0.8])

    def r(guidance: float | None) -> float:
        return float(table.planner(guidance=guidance).plan(evaluation(), 0).r)

    assert [r(scale) for scale in SCALES] == pytest.approx([0.2, 0.4, 0.8])
    assert r(3.0) == pytest.approx(0.6)
    assert (r(99.0), r(0.1), r(None)) == pytest.approx((0.8, 0.2, 0.2))


def test_its_own_intervals_are_planned_by_themselves() -> None:
    for k, interval in enumerate(pairwise(PLANNED.sigmas)):
        assert neighbours(PLANNED, *interval) == ((1.0, k),)
        rounded = torch.tensor(interval, dtype=torch.float32).tolist()
        assert neighbours(PLANNED, *rounded) == ((1.0, k),)


def test_other_intervals_are_planned_as_a_mean_of_the_nearest_ones() -> None:
    for levels in ((60.0, 20.0), (5.0, 4.0), (1.0, 0.1), (0.05, 0.01), (0.01, 0.0)):
        weights = neighbours(PLANNED, *levels)
        assert sum(weight for weight, _ in weights) == pytest.approx(1)
        assert all(0 <= k < PLANNED.planned for _, k in weights)
    halfway = [math.sqrt(a * b) for a, b in pairwise(PLANNED.sigmas)]
    (one, first), (other, second) = neighbours(PLANNED, halfway[0], halfway[1])
    assert (first, second) == (0, 1)
    assert one == pytest.approx(other, abs=0.2)
