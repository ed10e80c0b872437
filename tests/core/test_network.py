"""The paper's predictor and its settings."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture, noise

from amed_core import AMEDPredictor, PredictorConfig, evaluate, polynomial, sample
from amed_core.features import look_at_latent, pool, pooled_latent
from amed_core.midpoints import neighbours
from amed_core.network import embedding

GRID = tuple(polynomial(4, SIGMA_MIN, SIGMA_MAX).tolist())
CONFIG = PredictorConfig("amed", GRID, SIGMA_MIN, SIGMA_MAX, scale_dir=0.01, scale_time=0.2)


@pytest.mark.parametrize(("scale_dir", "scale_time", "weights"), [(0, 0, 8929), (0.01, 0, 8950), (0.01, 0.2, 8971)])
def test_it_has_the_papers_number_of_weights(scale_dir: float, scale_time: float, weights: int) -> None:
    predictor = AMEDPredictor(replace(CONFIG, scale_dir=scale_dir, scale_time=scale_time))
    assert sum(p.numel() for p in predictor.parameters()) == weights


def test_r_and_scales_stay_in_their_ranges_whatever_the_features() -> None:
    predictor = AMEDPredictor(CONFIG)
    features = 1e4 * torch.randn(500, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = predictor(features, embedding((80.0, 1.0)).float())
    assert ((plan.r >= 0) & (plan.r <= 1)).all()
    assert ((plan.scale_dir - 1).abs() <= 0.01 + 1e-6).all()
    assert ((plan.scale_time - 1).abs() <= 0.2 + 1e-6).all()
    assert plan.r.std() > 0, "it must look at the features"


def test_no_range_means_no_scaling() -> None:
    plan = AMEDPredictor(replace(CONFIG, scale_dir=0, scale_time=0))(
        torch.zeros(2, 8, 8), embedding((80.0, 1.0)).float()
    )
    assert (plan.scale_dir, plan.scale_time) == (1.0, 1.0)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 12, 12), (2, 32, 20), (2, 5, 16, 16), (2, 5, 3, 8, 8)])
def test_a_bottleneck_of_any_resolution_is_averaged_to_8_by_8(shape: tuple[int, ...]) -> None:
    features = torch.rand(shape)
    assert pool(features).shape == (2, 8, 8)
    torch.testing.assert_close(pool(torch.ones(shape)), torch.ones(2, 8, 8))
    if len(shape) == 4:
        torch.testing.assert_close(pool(features), pool(features.mean(1)))


@pytest.mark.parametrize("shape", [(2, 6), (2, 8, 100), (2, 4, 12, 20), (2, 16, 3, 10, 8), (2, 1, 77)])
def test_the_latent_of_any_rank_is_seen_at_unit_scale(shape: tuple[int, ...]) -> None:
    """Vectors, audio, images and video; the denoised sample beside the noisy one."""
    for sigma in (0.5, 80.0):
        x = (1 + sigma**2) ** 0.5 * torch.ones(shape, dtype=torch.float64)
        seen = look_at_latent(evaluate(lambda x, sigma: 2 * torch.ones_like(x), x, torch.tensor(sigma)))
        assert seen.shape == (2, 2, 8, 8)
        torch.testing.assert_close(seen[:, 0], torch.ones(2, 8, 8, dtype=torch.float64))
        torch.testing.assert_close(seen[:, 1], 2 * torch.ones(2, 8, 8, dtype=torch.float64))


def test_the_latents_layout_is_seen() -> None:
    """A bright upper half of an image or video, and a loud beginning of a sound."""
    for shape in ((1, 4, 16, 16), (1, 4, 3, 16, 16), (1, 4, 128)):
        x = torch.zeros(shape)
        x[..., : shape[-2] // 2, :] = 1 if len(shape) > 3 else 0
        if len(shape) == 3:
            x[..., : shape[-1] // 2] = 1
        assert pooled_latent(x)[0, :4].min() == 1
        assert pooled_latent(x)[0, 4:].max() == 0


def test_a_predictor_of_latents_samples_whatever_the_denoiser_answers_beside_them() -> None:
    config = replace(CONFIG, features="latent")
    grid = torch.tensor(GRID, dtype=torch.float64)
    x = SIGMA_MAX * noise(4, 1, 4, 4)
    both = [
        sample(denoiser, x, on(grid, config.build_solver(), AMEDPredictor(config).planner()))
        for denoiser in (mixture, lambda x, sigma: mixture(x, sigma)[0])
    ]
    assert (both[0] == both[1]).all()


@pytest.mark.parametrize("features", ["bottleneck", "latent", "none"])
def test_a_samples_plan_does_not_depend_on_its_batch_mates(features: str) -> None:
    config = replace(CONFIG, features=features)
    grid = torch.tensor(GRID, dtype=torch.float64)
    x = SIGMA_MAX * noise(4, 1, 4, 4)
    planner = AMEDPredictor(config).planner()
    together = sample(mixture, x, on(grid, config.build_solver(), planner))
    for i in range(4):
        alone = sample(mixture, x[i : i + 1], on(grid, config.build_solver(), planner))
        # The predictor itself is float32: its matrix product rounds differently at another batch size.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_its_own_intervals_are_planned_by_themselves() -> None:
    for k, interval in enumerate(pairwise(GRID)):
        assert neighbours(CONFIG, *interval) == ((1.0, k),)
        rounded = torch.tensor(interval, dtype=torch.float32).tolist()
        assert neighbours(CONFIG, *rounded) == ((1.0, k),)


def test_other_intervals_are_planned_as_a_mean_of_the_nearest_ones() -> None:
    for levels in ((60.0, 20.0), (5.0, 4.0), (1.0, 0.1), (0.05, 0.01), (0.01, 0.0)):
        weights = neighbours(CONFIG, *levels)
        assert sum(weight for weight, _ in weights) == pytest.approx(1)
        assert all(0 <= k < CONFIG.planned for _, k in weights)
    halfway = [math.sqrt(a * b) for a, b in pairwise(GRID)]
    (one, first), (other, second) = neighbours(CONFIG, halfway[0], halfway[1])
    assert (first, second) == (0, 1)
    assert one == pytest.approx(other, abs=0.2)


def test_the_mean_of_two_plans_lies_between_them() -> None:
    predictor = AMEDPredictor(CONFIG, torch.Generator().manual_seed(3))
    start = evaluate(Gaussian(), SIGMA_MAX * noise(2, 1, 4, 4), torch.tensor(80.0, dtype=torch.float64))
    first, mean, second = (predictor.planner(levels).plan(start, 0) for levels in (GRID[:2], (20.0, 1.0), GRID[1:3]))
    for name in ("r", "scale_dir", "scale_time"):
        ends = torch.stack([getattr(first, name), getattr(second, name)])
        assert ((ends.amin(0) <= getattr(mean, name)) & (getattr(mean, name) <= ends.amax(0))).all()


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

    with pytest.raises(ValueError, match='features set to "latent"'):
        sample(bare, x, on(grid, CONFIG.build_solver(), AMEDPredictor(CONFIG).planner()))
    without = AMEDPredictor(replace(CONFIG, features="none"))
    with_features = sample(mixture, x, on(grid, CONFIG.build_solver(), without.planner()))
    torch.testing.assert_close(with_features, sample(bare, x, on(grid, CONFIG.build_solver(), without.planner())))


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
        ({"flow": True}, "end at 1"),
        ({"flow": True, "sigmas": (1.0, 0.1), "solver": "dpmpp", "prediction": "noise"}, "no noise prediction"),
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
