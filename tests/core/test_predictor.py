"""The paper's predictor and its settings."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture, noise

from amed_core import AMEDPredictor, PredictorConfig, evaluate, polynomial, sample
from amed_core.predictor import pool

GRID = tuple(polynomial(4, SIGMA_MIN, SIGMA_MAX).tolist())
CONFIG = PredictorConfig("amed", GRID, SIGMA_MIN, SIGMA_MAX, scale_dir=0.01, scale_time=0.2)


@pytest.mark.parametrize(("scale_dir", "scale_time", "weights"), [(0, 0, 8929), (0.01, 0, 8950), (0.01, 0.2, 8971)])
def test_it_has_the_papers_number_of_weights(scale_dir: float, scale_time: float, weights: int) -> None:
    predictor = AMEDPredictor(replace(CONFIG, scale_dir=scale_dir, scale_time=scale_time))
    assert sum(p.numel() for p in predictor.parameters()) == weights


def test_r_and_scales_stay_in_their_ranges_whatever_the_features() -> None:
    predictor = AMEDPredictor(CONFIG)
    features = 1e4 * torch.randn(500, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = predictor(features, torch.tensor(80.0), torch.tensor(1.0))
    assert ((plan.r >= 0) & (plan.r <= 1)).all()
    assert ((plan.scale_dir - 1).abs() <= 0.01 + 1e-6).all()
    assert ((plan.scale_time - 1).abs() <= 0.2 + 1e-6).all()
    assert plan.r.std() > 0, "it must look at the features"


def test_no_range_means_no_scaling() -> None:
    plan = AMEDPredictor(replace(CONFIG, scale_dir=0, scale_time=0))(
        torch.zeros(2, 8, 8), *torch.tensor([[80.0], [1.0]])
    )
    assert (plan.scale_dir, plan.scale_time) == (1.0, 1.0)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 12, 12), (2, 32, 20), (2, 5, 16, 16), (2, 5, 3, 8, 8)])
def test_a_bottleneck_of_any_resolution_is_averaged_to_8_by_8(shape: tuple[int, ...]) -> None:
    features = torch.rand(shape)
    assert pool(features).shape == (2, 8, 8)
    torch.testing.assert_close(pool(torch.ones(shape)), torch.ones(2, 8, 8))
    if len(shape) == 4:
        torch.testing.assert_close(pool(features), pool(features.mean(1)))


def test_features_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        pool(torch.zeros(2, 7))


def test_the_generator_decides_the_weights_and_torchs_own_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (AMEDPredictor(CONFIG, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (torch.get_rng_state() == before).all()


def test_a_model_without_a_bottleneck_needs_a_predictor_that_reads_none() -> None:
    x = SIGMA_MAX * noise(2, 1, 4, 4)
    grid = torch.tensor(GRID, dtype=torch.float64)

    def bare(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return mixture(x, sigma)[0]

    with pytest.raises(ValueError, match='features set to "none"'):
        sample(bare, x, grid, CONFIG.build_solver(), AMEDPredictor(CONFIG).planner())
    without = AMEDPredictor(replace(CONFIG, features="none"))
    with_features = sample(mixture, x, grid, CONFIG.build_solver(), without.planner())
    torch.testing.assert_close(with_features, sample(bare, x, grid, CONFIG.build_solver(), without.planner()))


def test_plans_take_the_samples_rank_and_dtype() -> None:
    for shape in ((2, 6), (2, 3, 5), (2, 1, 4, 4), (2, 1, 3, 4, 4)):
        start = evaluate(Gaussian(), SIGMA_MAX * noise(*shape), torch.tensor(80.0, dtype=torch.float64))
        plan = AMEDPredictor(CONFIG).planner()(start, torch.tensor(1.0, dtype=torch.float64), 0)
        assert plan is not None
        assert plan.r.shape == (2, *[1] * (len(shape) - 1))  # type: ignore[union-attr]
        assert plan.r.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rk4"}, "amed, euler, dpm_2, ipndm, dpmpp"),
        ({"schedule": "karras"}, "polynomial"),
        ({"sigmas": (80.0,)}, "at least 2 points"),
        ({"sigmas": (80.0, 90.0, 1.0)}, "must fall"),
        ({"sigmas": (80.0, math.nan)}, "must fall"),
        ({"sigmas": (80.0, -1.0)}, "must be positive"),
        ({"sigma_min": 0.0}, "must be positive"),
        ({"scale_dir": 1.0}, "scale_dir"),
        ({"scale_time": -0.1}, "scale_time"),
        ({"features": "all"}, "features"),
        ({"solver": "ipndm", "max_order": 7}, "orders 1 to 4"),
        ({"plain_last": True}, "ends at 0"),
    ],
)
def test_settings_that_no_sampler_could_follow_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_settings_survive_json() -> None:
    config = replace(CONFIG, sigmas=(*GRID[:-1], 0.0), plain_last=True, model={"family": "SD15", "sigma_max": 14.6})
    assert PredictorConfig.from_header(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="newer version"):
        PredictorConfig.from_header({**asdict(config), "future": 1})
    with pytest.raises(ValueError, match="incomplete"):
        PredictorConfig.from_header({"solver": "amed"})
