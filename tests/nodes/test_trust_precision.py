"""Half precision, fp8 weights, odd sizes, batches and sigma lists: a finite sample, or words that say what to do."""

import itertools
from typing import Any

import pytest
import torch
from families import SPECS, Family, make
from test_modes import custom
from toys import apply, flat, guided, k_sample, predictor

CFG = 3.0
STUDENTS = ("amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m")
FAMILIES = ("flux", "sd3", "lumina2", "wan21", "sd15", "qwen_image")
# (weights, what they are cast to)
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8 e4m3 cast to bf16": (torch.float8_e4m3fn, torch.bfloat16),
    "fp8 e5m2 cast to fp16": (torch.float8_e5m2, torch.float16),
}
SIZES = {"odd": (1, 7), "one row": (2, 12), "large": (24, 20)}  # height and width of latents


def odd_shape(name: str, height: int, width: int) -> tuple[int, ...]:
    """The shape of a family's latents at a size."""
    return (*SPECS[name].shape[:-2], height, width)


@pytest.mark.trust("precision")
def test_other_precisions_draw_finite_samples(pack: Any, trials: Any) -> None:
    uses = [(name, kind, student) for name in FAMILIES for kind in KINDS for student in STUDENTS]
    for name, kind, student in uses[:: 1 if trials.full else 11]:
        dtype, cast = KINDS[kind]
        family = make(name, dtype=dtype, cast=cast)
        assert dtype in {weight.dtype for weight in family.model.model.diffusion_model.parameters()}
        drawn = k_sample(family, apply(pack, family, predictor(pack, family, student, guidance=CFG)), 5, CFG, student)
        trials.held(f"{name} {kind} {student}", bool(drawn.isfinite().all()) and float(drawn.std()) > 0, "not finite")


@pytest.mark.trust("precision")
def test_odd_sizes_and_batches_draw_finite_samples(pack: Any, trials: Any) -> None:
    uses = list(itertools.product(FAMILIES, STUDENTS[::2], (1, 3), SIZES))
    for name, student, batch, size in uses[:: 1 if trials.full else 13]:
        family = make(name, batch=batch, shape=odd_shape(name, *SIZES[size]))
        stock, applied = family.model, apply(pack, family, predictor(pack, family, student, guidance=CFG))
        try:
            expected = k_sample(family, stock, 3, CFG, "euler", "simple").isfinite().all()
        except Exception:
            continue  # which the family's own network cannot do
        drawn = k_sample(family, applied, 5, CFG, student)
        well = bool(expected) and bool(drawn.isfinite().all()) and drawn.shape == flat(family.latent["samples"]).shape
        trials.held(f"{name} {student} {batch} of {size} size", well, f"{tuple(drawn.shape)}")


FINITE, REFUSED = "a finite sample", "words"
LISTS: dict[str, tuple[list[float], str]] = {
    "none": ([], FINITE),
    "one": ([0.7], FINITE),
    "one call": ([0.7, 0.0], FINITE),
    "one call, not to 0": ([0.7, 0.3], FINITE),
    "many": ([1.0 - n / 40 for n in range(41)], FINITE),
    "near each other": ([0.7, 0.69999, 0.69998, 0.0], FINITE),
    "tiny": ([1e-3, 1e-4, 1e-5, 0.0], FINITE),
    "twice the same": ([0.7, 0.7, 0.3, 0.0], REFUSED),
    "rising": ([0.3, 0.7, 0.9], REFUSED),
    "0 in the middle": ([0.7, 0.0, 0.3, 0.0], REFUSED),
    "below 0": ([0.7, 0.3, -0.1], REFUSED),
    "NaN": ([0.7, float("nan"), 0.0], REFUSED),
    "infinity": ([float("inf"), 0.7, 0.0], REFUSED),
}


def ends_as_it_should(pack: Any, family: Family, student: str, levels: list[float], dtype: torch.dtype) -> str:
    """How a run on these levels ends."""
    made = predictor(pack, family, student, guidance=CFG)
    try:
        drawn, _ = custom(pack, family, made, guided(family), torch.tensor(levels, dtype=dtype))
    except ValueError as error:
        return REFUSED if len(str(error).split()) > 5 else f"raw: {error}"
    except Exception as error:
        return repr(error)
    return FINITE if drawn.isfinite().all() else "a sample that is not finite"


@pytest.mark.trust("precision")
def test_every_list_of_sigmas_is_sampled_or_refused_in_words(pack: Any, trials: Any) -> None:
    family = make("flux")
    dtypes = (torch.float32, torch.float64, torch.bfloat16) if trials.full else (torch.float32,)
    uses = [(name, student, dtype) for name in LISTS for student in STUDENTS for dtype in dtypes]
    for name, student, dtype in uses[:: 1 if trials.full else 5]:
        levels, expected = LISTS[name]
        found = ends_as_it_should(pack, family, student, levels, dtype)
        rounded = dtype == torch.bfloat16 and name == "near each other"  # which are then the same
        trials.held(f"{name} {student} {dtype}", found == expected or rounded, found)
