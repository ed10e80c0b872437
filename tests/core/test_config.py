"""The settings of a predictor, which are the header of its file."""

import json
import math
from dataclasses import asdict, replace

import pytest
from problems import GRID, SIGMA_MAX, SIGMA_MIN, multistep_config

from amed_core import PredictorConfig, polynomial
from amed_core.solvers import SOLVERS

PLANNED = tuple(polynomial(4, SIGMA_MIN, SIGMA_MAX).tolist())
CONFIG = PredictorConfig("amed", PLANNED, SIGMA_MIN, SIGMA_MAX, scale_dir=0.01, scale_time=0.2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rk4"}, ", ".join(SOLVERS)),
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
    config = replace(CONFIG, sigmas=(*PLANNED[:-1], 0.0), plain_last=True, model={"family": "SD15", "sigma_max": 14.6})
    assert PredictorConfig.from_header(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="newer version"):
        PredictorConfig.from_header({**asdict(config), "future": 1})
    with pytest.raises(ValueError, match="incomplete"):
        PredictorConfig.from_header({"solver": "amed"})


def test_a_file_with_a_network_that_corrects_a_table_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="no longer exists here: train it again"):
        PredictorConfig.from_header({**asdict(CONFIG), "centred": True})
    assert PredictorConfig.from_header({**asdict(CONFIG), "centred": False}) == CONFIG


def test_settings_that_no_multistep_table_has_are_refused() -> None:
    config = multistep_config(5)
    assert multistep_config(len(GRID) - 2, sigmas=GRID[:-1]).sigmas[-1] > 0, "it may end where another sampler goes on"
    for changes in ({"analytic_first_step": True}, {"plain_last": True}):
        with pytest.raises(ValueError, match="once per interval"):
            replace(config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"first_sigma": 8.0},
        {"first_sigma": 8.0, "channels": 3, "sigmas": (80.0, 9.0, 0.0)},
        {"kind": "table", "guided": True},
        {"kind": "table", "spectral": True},
    ],
)
def test_first_steps_and_bands_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"first step|multistep"):
        replace(multistep_config(3), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("negatives", [(1, 0), (0, 0), (0, 3), (-1,)])
def test_negatives_that_are_asked_at_no_interval_are_refused(negatives: tuple[int, ...]) -> None:
    assert multistep_config(3, guided=True, negatives=(0, 2)).negatives == (0, 2)
    with pytest.raises(ValueError, match="ask the negative"):
        multistep_config(3, guided=True, negatives=negatives)
    with pytest.raises(ValueError, match="leave out the negative"):
        multistep_config(3, negatives=(0, 2))


def test_passes_are_two_for_each_guided_call_and_one_where_no_negative_is_asked() -> None:
    config = multistep_config(7, guidance=3.0, guided=True)
    assert config.passes == 14
    assert replace(config, negatives=(0, 2, 3)).passes == 10
    assert replace(config, guidance=1.0).passes == 7


@pytest.mark.parametrize("switch", [0.0, 0.1, 3.0, 79.0])
def test_the_second_model_begins_at_the_first_level_below_the_switch(switch: float) -> None:
    config = multistep_config(5, sigmas=GRID, switch_sigma=switch)
    below = [k for k, sigma in enumerate(GRID[:-1]) if sigma < switch]
    assert config.switch == (below[0] if below else 0)


@pytest.mark.parametrize("solver", ["amed", "euler", "dpm_2", "ipndm", "dpmpp"])
def test_r_may_be_0_only_where_no_update_divides_by_it(solver: str) -> None:
    config = replace(CONFIG, solver=solver, kind="table")
    assert (config.bounds[0][0] > 0) == config.build_solver().divides_by_r
    assert 0 < config.bounds[0][1] < 1
    assert config.bounds[1:] == ((0.99, 1.01), (0.8, 1.2))
