"""Training in the node: derivatives in every family, what is left behind, prompts, guidance, and what is shown."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SPECS, Family, make
from torch import Tensor
from toys import guided, inside

SCALE = 3.0


@pytest.fixture
def flux(pack: Any) -> Family:
    return make("flux")


@pytest.fixture
def user(pack: Any, tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's user folder, where unfinished fits are kept."""
    import folder_paths  # noqa: PLC0415

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path))
    yield tmp_path / "amed_training"
    folder_paths.set_user_directory(before)


# Derivatives


def gradient_of(pack: Any, family: Family, gradient: str) -> tuple[Tensor, str]:
    """Of one interval's loss by the predictor's weights, through the guided model; and the method that was used."""
    core, nodes = pack.amed_core, pack.nodes
    model = nodes.timesteps.with_interpolated_timesteps(family.model)
    clone = nodes.gradients.without_inference_tensors

    def work(wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any) -> tuple[Tensor, str]:
        del sigmas
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
            if gradient == "reverse":
                stack.enter_context(nodes.gradients.differentiable(wrapped.inner_model))
            config = nodes.training.student_config(model, "amed", 3, features="latent", scale_time=0.2)
            network = core.AMEDPredictor(config, torch.Generator().manual_seed(1))
            denoiser = nodes.bridge.ComfyDenoiser(wrapped, extra_args, config.sigmas, bottleneck=False)
            start = x.clone() * config.sigmas[0]
            settings = core.TrainConfig(
                trajectories=len(x), batch_size=len(x), gradient=gradient, step=3e-4, teacher="euler", teacher_points=1
            )
            fitted = core.Trainer(network, lambda rows: (start, denoiser), settings)
            loss = fitted.loss(fitted.begin())[0]
            loss.backward(inputs=list(network.parameters()))
            return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]), fitted.gradient

    guider = guided(family, model, SCALE, clone(family.positive), clone(family.negative))
    return inside(guider, family, work)


@pytest.mark.parametrize("name", SPECS)
def test_all_three_ways_give_the_same_gradient(pack: Any, name: str) -> None:
    """Forward and reverse mode to rounding; finite differences of toys with random weights, which are rough, to 3 %."""
    family = make(name, batch=1)
    reverse, _ = gradient_of(pack, family, "reverse")
    forward, used = gradient_of(pack, family, "forward")
    differences, _ = gradient_of(pack, family, "finite difference")
    assert used == "forward", "it passed its check"
    assert float((forward - reverse).norm() / reverse.norm()) < 1e-3
    assert float((differences - reverse).norm() / reverse.norm()) < 0.03
