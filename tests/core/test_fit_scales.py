"""One table for several guidance scales."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import (
    SCALES,
    SHAPE,
    SIGMA_MAX,
    SMALL,
    Mixture,
    X,
    end_to_end_fit,
    midpoint_config,
    multistep_config,
    same,
)

from amed_core import Fit, MultistepTable, PredictorConfig, load_predictor, make_fit, sample, save_predictor
from amed_core.fit.trajectories import gaussian

KINDS = pytest.mark.parametrize("config", [midpoint_config(), multistep_config(4)], ids=["midpoints", "multistep"])


def several(config: PredictorConfig, scales: tuple[float, ...] = SCALES) -> Fit:
    config = replace(config, guidance=scales[0], guidances=scales)
    fit = make_fit(config, SMALL, [gaussian(Mixture(scale), SHAPE, SIGMA_MAX) for scale in scales])
    list(fit.events())
    return fit


@KINDS
def test_at_the_largest_scale_it_is_the_fit_at_that_scale_alone(config: PredictorConfig) -> None:
    fit = several(config)
    alone = end_to_end_fit(replace(config, guidance=SCALES[-1]), SMALL, Mixture(SCALES[-1]))
    list(alone.events())
    expected = sample(Mixture(SCALES[-1]), X, alone.predictor.method())
    found = sample(Mixture(SCALES[-1]), X, fit.predictor.method(guidance=SCALES[-1]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_midpoints_at_every_scale_are_those_of_a_fit_at_it_alone() -> None:
    scales = (1.0, 2.0, 4.0)
    fit = several(midpoint_config(), scales)
    for scale in scales:
        alone = end_to_end_fit(midpoint_config(guidance=scale), SMALL, Mixture(scale))
        list(alone.events())
        expected, found = (
            sample(Mixture(scale), X, predictor.method(guidance=scale))
            for predictor in (alone.predictor, fit.predictor)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@KINDS
def test_its_error_is_the_root_mean_square_of_the_scales_and_less_than_the_baselines(config: PredictorConfig) -> None:
    summary = several(config).summary()
    each = list(summary.details["scales"].values())
    assert len(each) == len(SCALES)
    assert summary.error == pytest.approx((sum(error**2 for error in each) / len(each)) ** 0.5)
    assert summary.gain is not None
    assert summary.gain > 0.1


def test_multistep_scales_share_the_grid_and_no_weights(tmp_path: Path) -> None:
    fit = several(multistep_config(4))
    assert isinstance(fit.predictor, MultistepTable)
    one, other = fit.predictor.alone()
    assert one.config.sigmas == other.config.sigmas
    assert float((one.weights - other.weights).abs().max()) > 1e-3
    save_predictor(fit.predictor, tmp_path / "p.safetensors")
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.config.guidances == SCALES
    assert same(loaded, fit.predictor)


def test_before_the_first_event_every_scale_has_a_table() -> None:
    config = midpoint_config(guidance=SCALES[0], guidances=SCALES)
    fit = make_fit(config, SMALL, [gaussian(Mixture(scale), SHAPE, SIGMA_MAX) for scale in SCALES])
    for scale in SCALES:
        assert sample(Mixture(scale), X, fit.predictor.method(guidance=scale)).isfinite().all()
