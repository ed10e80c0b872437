"""Every figure of the published code, to a relative 1e-9 in float64.

The environment variable AMED_REFERENCE names a folder with `amed_reference.json` and
`amed_reference.safetensors`; the default is a subset of it that stands beside the tests.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from amed_core import AMEDPredictor, Method, PredictorConfig, TrainConfig, analytic_first, trajectory
from amed_core.features import POOLED
from amed_core.fit.per_interval import PerInterval
from amed_core.fit.teacher import TEACHERS
from amed_core.schedules import schedule

FOLDER = Path(os.environ.get("AMED_REFERENCE") or Path(__file__).parents[1] / "data" / "reference")
CASES: list[dict[str, Any]] = json.loads((FOLDER / "amed_reference.json").read_text())
FILE = safe_open(FOLDER / "amed_reference.safetensors", framework="pt")
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
NAMES = {"dpm": "dpm_2"}  # ours for theirs
WEIGHTS = {  # theirs to ours
    "enc_layer0": "encode_1",
    "enc_layer1": "encode_2",
    "map_layer0": "embed_noise",
    "fc_r": "head_r",
    "fc_scale_dir": "head_scale_dir",
    "fc_scale_time": "head_scale_time",
}


def mixture(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's closed-form denoiser and its two-channel bottleneck."""
    means, variance = FILE.get_tensor("means"), FILE.get_tensor("std") ** 2
    v = variance + sigma.reshape(-1, 1) ** 2  # (batch or 1, K)
    distance = (x[:, None] - means).square().flatten(2).sum(2)
    weights = torch.softmax(-distance / (2 * v) - 32 * v.log(), dim=1)[..., None, None, None]
    v = v[..., None, None, None]
    each = (variance[:, None, None, None] * x[:, None] + (v - variance[:, None, None, None]) * means) / v
    denoised = (weights * each).sum(1)
    return denoised, torch.cat([denoised, 0.5 * x / (1 + sigma**2).sqrt()], dim=1)


def cases(kind: str) -> Any:
    found = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", found, ids=[str(case["id"]) for case in found])


def close(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest element: single elements of a sample may vanish."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-9, f"relative error {error:.2e}"


def config(case: dict[str, Any], solver: str) -> PredictorConfig:
    grid = schedule(case["schedule"])(case["num_steps"], SIGMA_MIN, SIGMA_MAX, case["rho"])
    return PredictorConfig(
        solver=NAMES.get(solver, solver),
        sigmas=tuple(grid.tolist()),
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
        schedule=case["schedule"],
        rho=case["rho"],
        analytic_first_step=case["afs"],
        max_order=case.get("max_order", 4 if "ipndm" in (solver, case.get("teacher")) else 3),
        prediction="data" if case.get("predict_x0", True) else "noise",
        lower_order_final=case.get("lower_order_final", True),
        thresholding=case.get("predict_x0", True),
        scale_dir=case.get("scale_dir", 0.0),
        scale_time=case.get("scale_time", 0.0),
    )


def predictor(case: dict[str, Any], solver: str) -> AMEDPredictor:
    prefix = f"predictor.{case['scale_dir']}.{case['scale_time']}."
    weights = {}
    for name in FILE.keys():  # noqa: SIM118
        if name.startswith(prefix):
            layer, part = name.removeprefix(prefix).split(".")
            weights[f"{WEIGHTS[layer]}.{part}"] = FILE.get_tensor(name)
    made = AMEDPredictor(config(case, solver)).double()
    made.load_state_dict(weights)
    return made


def grid(case: dict[str, Any]) -> Tensor:
    return schedule(case["schedule"])(case["num_steps"], SIGMA_MIN, SIGMA_MAX, case["rho"])


def states(case: dict[str, Any], solver: Any, planner: Any) -> Tensor:
    x = FILE.get_tensor("z") * grid(case)[0]
    method = Method(tuple(grid(case).tolist()), solver, planner, analytic_first if case["afs"] else None)
    steps = trajectory(mixture, x, method)
    with torch.no_grad():
        return torch.stack([x, *(step.x for step in steps)])


@cases("schedule")
def test_schedule(case: dict[str, Any]) -> None:
    sigmas = schedule(case["schedule"])(case["num_steps"], case["sigma_min"], case["sigma_max"], case["rho"])
    expected = FILE.get_tensor(f"schedule.{case['id']}")
    torch.testing.assert_close(sigmas, expected.double(), rtol=1e-9, atol=0)


@cases("teacher")
def test_teacher(case: dict[str, Any]) -> None:
    student = config(case, "dpmpp" if case["solver"] == "dpmpp" else "ipndm")
    solver, planner = TEACHERS[NAMES.get(case["solver"], case["solver"])](student)
    close(states(case, solver, planner), FILE.get_tensor(f"teacher.{case['id']}"))


@cases("student")
def test_student(case: dict[str, Any]) -> None:
    made = predictor(case, case["solver"])
    close(states(case, made.config.build_solver(), made.planner()), FILE.get_tensor(f"student.{case['id']}"))


@cases("train")
def test_training_losses_and_gradients(case: dict[str, Any]) -> None:
    made = predictor(case, case["student"])
    z = FILE.get_tensor("z")
    settings = TrainConfig(
        trajectories=len(z),
        batch_size=len(z),
        teacher=NAMES.get(case["teacher"], case["teacher"]),
        teacher_points=case["M"],
    )
    fit = PerInterval(made, lambda rows: (z * grid(case)[0], mixture), settings)
    batch = fit.begin()
    close(torch.stack(batch.teacher.targets), FILE.get_tensor(f"train.{case['id']}.teacher"))
    theirs = {ours: name for name, ours in WEIGHTS.items()}
    for interval, expected_loss in enumerate(FILE.get_tensor(f"train.{case['id']}.loss")):
        made.zero_grad()
        loss, student, _, history = fit.loss(batch)
        loss.backward()
        named = sorted(((theirs[n.split(".")[0]] + n[n.index(".") :]), p) for n, p in made.named_parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
        close(loss.detach(), expected_loss)
        close(student, FILE.get_tensor(f"train.{case['id']}.student.{interval}"))
        close(torch.cat([g.flatten() for g in gradients]), FILE.get_tensor(f"train.{case['id']}.grad.{interval}"))
        batch.x, batch.history, batch.interval = student, history, interval + 1


def test_the_bottleneck_of_the_reference_has_the_predictors_resolution() -> None:
    assert FILE.get_tensor("z").shape[-1] == POOLED


def test_every_case_of_the_file_is_of_a_kind_that_is_run() -> None:
    assert {case["kind"] for case in CASES} <= {"schedule", "teacher", "student", "train"}
