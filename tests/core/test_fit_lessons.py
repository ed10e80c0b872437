"""What students have seen: from it weights follow again, for students that stand elsewhere."""

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, X, mixture, table_on
from torch import Tensor

from amed_core import sample
from amed_core.fit.closed_form import Walk
from amed_core.fit.lessons import Learns, Lessons, taught
from amed_core.fit.teacher import levels, path
from amed_core.types import Answer, Sample


def slopes_of_their_own(x: Sample, sigma: Tensor) -> Sample:
    """A model whose slope does not depend on where it is asked, but on the noise level and the pixel."""
    slope = torch.linspace(0, 3, x[0].numel(), dtype=x.dtype).view(x[0].shape).sin() * (1 + sigma).log()
    return x - sigma * slope


def guided_slopes_of_their_own(x: Sample, sigma: Tensor) -> Answer:
    """The same, of which guidance is a part."""
    denoised = slopes_of_their_own(x, sigma)
    return denoised, None, sigma * (x - denoised).cos()


@pytest.mark.parametrize("learns", [Learns(), Learns(guided=True), Learns(spectral=True), Learns(True, True)])
def test_lessons_hold_for_any_weights_where_slopes_stay(learns: Learns) -> None:
    """The equations of a run with other weights, without that run."""
    teacher = path(slopes_of_their_own, X, levels(SIGMA_MIN, SIGMA_MAX, 20, flow=False))
    before, after = (table_on(guided=learns.guided, spectral=learns.spectral) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for name, values in after.learned.items():
        if name != "scale_time":
            more = 0.1 * torch.randn(values.shape, generator=generator)
            values.add_(more if name in ("first", "spectral") else more.tril())
    runs = {}
    for table in (before, after):
        walk, equations = Walk(guided_slopes_of_their_own, X, teacher), []
        for k in range(table.config.intervals):
            equations.append(walk.equations(table, k))
            walk.go(table, k)
        runs[table] = (walk, equations)
    lessons = Lessons.none(before).and_of(runs[before][0].history, teacher)
    stood = [lessons.begin]
    for k, expected in enumerate(runs[after][1]):
        found = lessons.equations(after, k, stood)
        scale = float(expected.products.abs().max())
        torch.testing.assert_close(found.products, expected.products, rtol=1e-4, atol=1e-5 * scale)
        stood.append(lessons.after(after, k, stood))
    moved = [a.products - b.products for a, b in zip(runs[after][1], runs[before][1], strict=True)]
    assert float(moved[-1].abs().max()) > 1e-3, "the weights matter"


def test_the_lesson_of_a_walk_teaches_what_the_walk_learned() -> None:
    teacher = path(mixture, X, levels(SIGMA_MIN, SIGMA_MAX, 20, flow=False))
    walk = Walk(mixture, X, teacher)
    made, _ = taught(table_on(), Lessons.none(table_on()), walk)
    again, _ = taught(table_on(), Lessons.none(table_on()).and_of(walk.history, teacher))
    torch.testing.assert_close(again.weights, made.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sample(mixture, X, made.method()), walk.x, rtol=1e-4, atol=1e-4)
