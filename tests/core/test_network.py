"""The paper's predictor."""

from dataclasses import replace

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture, noise

from amed_core import AMEDPredictor, PredictorConfig, evaluate, polynomial, sample
from amed_core.network import embedding
from amed_core.types import Run

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


def test_a_predictor_of_latents_samples_whatever_the_denoiser_answers_beside_them() -> None:
    config = replace(CONFIG, features="latent")
    x = SIGMA_MAX * noise(4, 1, 4, 4)
    both = [
        sample(denoiser, x, AMEDPredictor(config).method())
        for denoiser in (mixture, lambda x, sigma: mixture(x, sigma)[0])
    ]
    assert (both[0] == both[1]).all()


@pytest.mark.parametrize("features", ["bottleneck", "latent", "none"])
def test_a_samples_plan_does_not_depend_on_its_batch_mates(features: str) -> None:
    config = replace(CONFIG, features=features)
    x = SIGMA_MAX * noise(4, 1, 4, 4)
    method = AMEDPredictor(config).method()
    together = sample(mixture, x, method)
    for i in range(4):
        alone = sample(mixture, x[i : i + 1], method)
        # The predictor itself is float32: its matrix product rounds differently at another batch size.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_mean_of_two_plans_lies_between_them() -> None:
    predictor = AMEDPredictor(CONFIG, torch.Generator().manual_seed(3))
    start = evaluate(Gaussian(), SIGMA_MAX * noise(2, 1, 4, 4), torch.tensor(80.0, dtype=torch.float64))
    runs = (Run(levels, frozenset(), False, False) for levels in (GRID[:2], (20.0, 1.0), GRID[1:3]))
    first, mean, second = (predictor.planner(run).plan(start, 0) for run in runs)
    for name in ("r", "scale_dir", "scale_time"):
        ends = torch.stack([getattr(first, name), getattr(second, name)])
        assert ((ends.amin(0) <= getattr(mean, name)) & (getattr(mean, name) <= ends.amax(0))).all()


def test_the_generator_decides_the_weights_and_torchs_own_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (AMEDPredictor(CONFIG, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (torch.get_rng_state() == before).all()


def test_a_model_without_a_bottleneck_needs_a_predictor_that_reads_none() -> None:
    x = SIGMA_MAX * noise(2, 1, 4, 4)

    def bare(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return mixture(x, sigma)[0]

    with pytest.raises(ValueError, match='features set to "latent"'):
        sample(bare, x, AMEDPredictor(CONFIG).method())
    without = AMEDPredictor(replace(CONFIG, features="none"))
    with_features = sample(mixture, x, without.method())
    torch.testing.assert_close(with_features, sample(bare, x, without.method()))


def test_plans_take_the_samples_rank_and_dtype() -> None:
    for shape in ((2, 6), (2, 3, 5), (2, 1, 4, 4), (2, 1, 3, 4, 4)):
        start = evaluate(Gaussian(), SIGMA_MAX * noise(*shape), torch.tensor(80.0, dtype=torch.float64))
        plan = AMEDPredictor(CONFIG).planner()(start, torch.tensor(1.0, dtype=torch.float64), 0)
        assert plan is not None
        assert plan.r.shape == (2, *[1] * (len(shape) - 1))  # type: ignore[union-attr]
        assert plan.r.dtype == torch.float64  # type: ignore[union-attr]
