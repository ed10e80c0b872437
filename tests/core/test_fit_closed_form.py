"""Weights in closed form, from a teacher's path."""

from pathlib import Path

import pytest
import torch
from memory import Peak
from problems import GRID, SIGMA_MAX, SIGMA_MIN, Gaussian, Guided, X, mixture, noise, table_on
from torch import Tensor

from amed_core import MultistepTable, load_predictor, sample, save_predictor
from amed_core.call_list import all_plain
from amed_core.fit.closed_form import (
    AT_ONCE,
    PRIOR_WEIGHT,
    RIDGE,
    NormalEquations,
    Walk,
    hold_of,
    inner_products,
    least_squares,
    solved,
    solved_apart,
    with_energy,
)
from amed_core.fit.teacher import TeacherPath, levels, path
from amed_core.spectrum import BANDS, bands, combined, from_spectrum, spectrum
from amed_core.types import Denoiser, Sample


def fitted(
    table: MultistepTable, denoiser: Denoiser, teacher: TeacherPath, ridge: float = RIDGE
) -> tuple[MultistepTable, Sample]:
    """The table with weights in closed form, and where its samples end."""
    walk = Walk(denoiser, X, teacher)
    return least_squares(table, [walk], ridge=ridge), walk.x


def test_on_a_gaussian_the_closed_form_is_exact() -> None:
    """All slopes and samples lie in the plane of x and the mean: two weights reach every level."""
    model = Gaussian(mean=0.3)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 60, flow=False))
    made, end = fitted(table_on(), model, teacher, ridge=1e-12)
    first = (teacher.at(GRID[1])[0] - X - (GRID[1] - GRID[0]) * teacher.slopes[0]).square().mean().sqrt()
    assert float(first) > 5e-3, "one slope does not reach the first level"
    assert float((end - teacher.end).square().mean().sqrt()) < 1e-4
    torch.testing.assert_close(sample(model, X, made.method()), end, rtol=1e-4, atol=1e-4)


def test_a_strong_ridge_keeps_the_weights_it_starts_from() -> None:
    teacher = path(mixture, X, levels(SIGMA_MIN, SIGMA_MAX, 9, flow=False))
    start = table_on()
    held, free = (fitted(start, mixture, teacher, ridge=ridge)[0].weights for ridge in (1e9, 1e-6))
    torch.testing.assert_close(held, start.weights, rtol=1e-4, atol=1e-4)
    assert float((free - start.weights).abs().max()) > 0.05


def test_with_both_answers_the_closed_form_comes_nearer() -> None:
    model = Guided(3.0)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 60, flow=False))
    errors = {}
    for guided in (False, True):
        made, end = fitted(table_on((80.0, 2.0, 0.5, 0.0), guided=guided), model, teacher)
        torch.testing.assert_close(sample(model, X, made.method()), end, rtol=1e-4, atol=1e-4)
        errors[guided] = float((end - teacher.end).square().mean().sqrt())
    assert errors[True] < 0.8 * errors[False]


def test_with_few_negatives_the_closed_form_comes_nearer_than_without_what_guidance_adds() -> None:
    """A conditional slope says nothing of guidance; one guidance slope carries it on."""
    model = Guided(3.0)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 60, flow=False))
    begun = table_on(GRID, guided=True, guidance=3.0, negatives=(0, 2))
    made, end = fitted(begun, model, teacher)
    torch.testing.assert_close(sample(model, X, made.method()), end, rtol=1e-4, atol=1e-4)
    assert [len(made.row(k)) for k in range(5)] == [3, 4, 6, 7, 8], "slopes, the first sample, guidance where asked"
    without = sample(model.conditional, X, fitted(table_on(GRID), model, teacher)[0].method())
    errors = [float((x - teacher.end).square().mean().sqrt()) for x in (end, without)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("guided", [False, True])
def test_a_table_with_all_that_there_is_survives_its_file(tmp_path: Path, guided: bool) -> None:
    model = Guided(3.0)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 20, flow=False))
    begun = table_on(GRID, guided=guided, spectral=True, first_sigma=20.0, channels=1)
    made, end = fitted(begun, model, teacher)
    torch.testing.assert_close(sample(model, X, made.method()), end, rtol=1e-4, atol=1e-4)
    save_predictor(made, tmp_path / "table.safetensors", {})
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, MultistepTable)
    assert loaded.config == made.config
    assert (sample(model, X, loaded.method()) == sample(model, X, made.method())).all()


def test_weights_of_bands_are_least_squares_of_their_own() -> None:
    """Two bands that the teacher takes at different speeds: one weight misses both, a weight for each misses none."""
    model, begun = Gaussian(), SIGMA_MAX * noise(400, *X.shape[1:])
    speeds = torch.linspace(0.2, 1.0, 16, dtype=torch.float64)[None]

    def moved(x: Tensor, sigma: float) -> Tensor:
        slope = (x - model(x, torch.tensor(SIGMA_MAX))[0]) / SIGMA_MAX
        return x + (sigma - SIGMA_MAX) * combined([slope], speeds)

    there = torch.stack([begun, moved(begun, 12.0), moved(begun, 12.0)])
    teacher = TeacherPath((SIGMA_MAX, 12.0, 0.0), there, torch.zeros_like(there[:-1]))
    errors = {}
    for spectral in (False, True):
        made = least_squares(table_on((80.0, 12.0, 0.0), spectral=spectral), [Walk(model, begun, teacher)])
        start = sample(model, begun, made.method(all_plain((80.0, 12.0))))
        errors[spectral] = float((start - there[1]).square().mean().sqrt())
    assert errors[True] < 0.1 * errors[False]


VECTORS = [noise(5, 2, 8, 8, seed=seed) for seed in range(3)]
AIM = noise(5, 2, 8, 8, seed=9)


def equations(rows: slice, spectral: bool) -> NormalEquations:
    return NormalEquations.of([vector[rows] for vector in VECTORS], AIM[rows], spectral=spectral)


@pytest.mark.parametrize("spectral", [False, True])
def test_trajectories_learnt_one_by_one_and_summed_are_those_learnt_at_once(spectral: bool) -> None:
    products, sizes = equations(slice(None), spectral).total()
    alone = [equations(slice(n, n + 1), spectral).total() for n in range(5)]
    torch.testing.assert_close(sum(one for one, _ in alone), products)
    torch.testing.assert_close(sum(size for _, size in alone), sizes)


@pytest.mark.parametrize("spectral", [False, True])
def test_leaving_a_trajectory_out_is_never_having_had_it(spectral: bool) -> None:
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    left, never = equations(slice(None), spectral).total(kept), equations(slice(0, 3), spectral).total()
    for here, there in zip(left, never, strict=True):
        torch.testing.assert_close(here, there)
    start = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(solved(left[0], start), solved(never[0], start))


def test_the_products_are_those_of_the_samples_in_all_bands_together() -> None:
    """The cosines are orthonormal, so bands add up to the whole."""
    whole, apart = equations(slice(None), False), equations(slice(None), True)
    torch.testing.assert_close(apart.products.sum(1, keepdim=True), whole.products)
    assert float(apart.sizes.sum()) == float(whole.sizes.sum()) == AIM[0].numel()
    torch.testing.assert_close(whole.products[2, 0, 0, -1], (VECTORS[0][2] * AIM[2]).sum())


def test_weights_are_least_squares() -> None:
    start = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)
    found = solved(equations(slice(None), False).total()[0], start, ridge=0.0)
    design = torch.stack([vector.flatten() for vector in VECTORS], 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(design, AIM.flatten()[:, None]).solution[:, 0])


def test_bands_that_want_the_same_weights_do_not_differ() -> None:
    together = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    aim = sum((w * vector for w, vector in zip(together, VECTORS, strict=True)), torch.zeros(()))
    equations = NormalEquations.of(VECTORS, aim, spectral=True)
    products, sizes = equations.total()
    torch.testing.assert_close(solved(products, 0 * together, 0.0), together)
    assert float(solved_apart(equations.products, sizes, together).abs().max()) < 1e-9
    assert float((spectrum(aim).square().sum() - aim.square().sum()).abs()) < 1e-9 * float(aim.square().sum())


def test_bands_are_held_as_much_as_trajectories_that_are_left_out_say() -> None:
    """One weight per trajectory says nothing of the next trajectory's; one for all of them does."""
    generator = torch.Generator().manual_seed(0)
    vector, rest = torch.randn(2, 8, 3, 16, 16, generator=generator).unbind()
    together, bands_apart = torch.tensor([0.5], dtype=torch.float64), torch.linspace(-1, 1, BANDS)
    own = bands_apart + torch.randn(8, BANDS, generator=generator)

    def of(weights: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = spectrum(vector) * (0.5 + weights)[:, bands(vector)][:, None]
        equations = NormalEquations.of([vector], from_spectrum(coefficients) + 0.1 * rest, spectral=True)
        return equations.products, equations.sizes * 8

    learned, noisy = of(bands_apart[None]), of(own - own.mean(0))
    assert hold_of(*learned, together) < hold_of(*noisy, together)
    found = solved_apart(*learned, together)[0]
    assert float((found - bands_apart)[learned[1] > 0].abs().max()) < 0.1
    assert float(solved_apart(*noisy, together).abs().max()) < 0.3
    few = learned[0][:3], learned[1] * 3 / 8
    assert hold_of(*few, together) == PRIOR_WEIGHT, "so few do not show it"


def test_with_energy_every_band_has_its_aims_and_is_as_near_as_that_allows() -> None:
    """A part of the aim is what no vector knows: least squares leaves that out, and its energy with it."""
    x, first, second, unknown = torch.randn(4, 64, 2, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    aim = x + 0.7 * first - 0.5 * second + 0.6 * unknown
    products, sizes = NormalEquations.of((first, second, x), aim, spectral=True).total()
    inner = products[:, [0, 1], :][:, :, [0, 1]]
    together = torch.linalg.solve(inner.sum(0), (products[:, :2, 3] - products[:, :2, 2]).sum(0))
    apart = torch.zeros(2, len(sizes), dtype=torch.float64)
    found = with_energy(products, sizes, together, 64.0)

    def made(weights: Tensor, band: int) -> tuple[float, float]:
        """The energy of a band, and the squared distance to its aim."""
        own = products[band]
        energy = torch.cat([weights, torch.tensor([1.0, 0.0], dtype=torch.float64)])
        error = torch.cat([weights, torch.tensor([1.0, -1.0], dtype=torch.float64)])
        return float(energy @ own @ energy), float(error @ own @ error)

    for band in [n for n, size in enumerate(sizes) if size > 1000]:
        (before, _), (after, error) = (made(together + some[:, band], band) for some in (apart, found))
        aims = float(products[band, -1, -1])
        assert before < 0.9 * aims
        assert after == pytest.approx(aims, rel=1e-4)
        for turn in (0.05, -0.05):  # others of this energy are farther away
            other = together + found[:, band] + turn * torch.tensor([1.0, -1.0], dtype=torch.float64)
            low, high = 0.0, 4.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if made(middle * other, band)[0] < aims else (low, middle)
            assert made(low * other, band)[1] > error


def test_equations_of_large_samples_are_those_of_their_channels_and_take_little_memory() -> None:
    """A video's coefficients in float64, all vectors at once, would be several times what sampling it takes."""
    shape = (3, 4, 7, 120, 208)
    vectors, aim = [torch.randn(shape) for _ in range(6)], torch.randn(shape)
    with Peak() as peak:
        found = NormalEquations.of(vectors, aim, spectral=True)
    assert aim[0].numel() > AT_ONCE / 7, "it is taken apart"
    assert peak.most < 5 * 8 * AT_ONCE
    apart = [NormalEquations.of([v[:, c : c + 1] for v in vectors], aim[:, c : c + 1], spectral=True) for c in range(4)]
    torch.testing.assert_close(found.products, torch.stack([one.products for one in apart]).sum(0))
    assert torch.equal(found.sizes, torch.stack([one.sizes for one in apart]).sum(0))
    torch.testing.assert_close(found.products.sum(1), inner_products([*vectors, aim]), rtol=1e-4, atol=1e-1)
