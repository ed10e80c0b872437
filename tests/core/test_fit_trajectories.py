"""Where trajectories start, and model calls that are counted and split."""

import pytest
import torch
from problems import mixture, noise
from torch import Tensor

from amed_core.fit.trajectories import HELD_OUT, Metered, gaussian
from amed_core.fit.trajectories import noise as drawn
from amed_core.types import Denoiser, Sample

SHAPE = (1, 4, 4)


def test_a_trajectory_has_the_same_noise_in_every_batch() -> None:
    together = drawn(range(8), SHAPE, 3)
    apart = torch.cat([drawn(range(n, n + 1), SHAPE, 3) for n in range(8)])
    assert (together == apart).all()
    assert not (drawn(range(8), SHAPE, 4) == together).any(dim=1).all()
    assert not (drawn(range(HELD_OUT, HELD_OUT + 8), SHAPE, 3) == together).all()


def test_noise_is_standard_normal() -> None:
    sample = drawn(range(4000), SHAPE, 0)
    assert abs(float(sample.mean())) < 0.02
    assert abs(float(sample.var()) - 1) < 0.02
    correlation = (sample[1:].flatten(1) * sample[:-1].flatten(1)).mean()
    assert abs(float(correlation)) < 0.02


class Small:
    """A device with room for `room` samples, whose samples are conditioned by their rows."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int] = []

    def for_rows(self, rows: range) -> Denoiser:
        labels = torch.tensor([float(row % 3) for row in rows]).reshape(-1, 1, 1, 1)

        def denoiser(x: Sample, sigma: Tensor) -> tuple[Tensor, Tensor]:
            self.asked.append(len(x))
            if len(x) > self.room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return labels * mixture(x, sigma)[0], x.new_ones(len(x), 8, 8)

        return denoiser


def test_running_out_of_memory_halves_the_batch_and_changes_nothing() -> None:
    small, large = Small(3), Small(100)
    answers = []
    for device in (small, large):
        metered = Metered(gaussian(device, SHAPE, 5.0))  # type: ignore[arg-type]
        x, denoiser = metered(range(5, 17))
        per_sample = torch.linspace(0.5, 5, 12).reshape(-1, 1, 1, 1)
        answers.append([denoiser(x, sigma) for sigma in (torch.tensor(5.0), per_sample)])
        assert metered.calls == 24
    for here, there in zip(*answers, strict=True):
        torch.testing.assert_close(here[0], there[0])
        assert here[1] is not None
        assert len(here[1]) == 12
    assert small.asked == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3], "what fits is remembered"


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    x, denoiser = Metered(gaussian(Small(0), SHAPE, 5.0))(range(4))  # type: ignore[arg-type]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        denoiser(x, torch.tensor(5.0))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(x: Sample, sigma: Tensor) -> Sample:
        raise RuntimeError("expected 4 channels, but found 16")

    x, denoiser = Metered(lambda rows: (noise(len(rows), *SHAPE), broken))(range(4))
    with pytest.raises(RuntimeError, match="16"):
        denoiser(x, torch.tensor(5.0))


def test_another_complaint_about_a_batch_is_no_wish_for_single_samples() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        raise ValueError(f"expected batch size 16, but got {len(x)}")

    x, denoiser = Metered(gaussian(broken, (1, 2, 2), 2.0))(range(4))
    with pytest.raises(ValueError, match="but got 4"):
        denoiser(x, torch.tensor(2.0))


def test_a_model_that_takes_one_sample_at_a_time_is_given_one() -> None:
    sizes = []

    def picky(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 1:
            raise ValueError("This model supports batch size 1, but got 4")
        return x / (1 + sigma)

    meter = Metered(gaussian(picky, (1, 2, 2), 2.0))
    x, denoiser = meter(range(4))
    denoised = denoiser(x, torch.tensor(2.0))[0]
    torch.testing.assert_close(denoised, x / 3)
    assert sizes == [4, 1, 1, 1, 1]
    assert meter.calls == 4
    denoiser(x, torch.tensor(1.0))
    assert sizes[5:] == [1, 1, 1, 1], "it is not tried again"
