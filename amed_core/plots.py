"""Pictures of samples and of what a predictor learned, for the command line."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from .report import Learned
from .types import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 96  # pixels a sample is at least enlarged to


def is_image(samples: Sample) -> bool:
    """Whether a person can look at these samples: (n, 1 or 3, height, width)."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def as_pixels(samples: Sample) -> Tensor:
    """Samples in [-1, 1] as bytes (n, height, width, 3), enlarged smoothly."""
    scale = max(1, math.ceil(SIDE / samples.shape[-1]))
    large = functional.interpolate(samples.float().cpu(), scale_factor=scale, mode="bicubic", align_corners=False)
    return ((large.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).movedim(1, -1)


def save_samples(samples: Sample, path: Path) -> None:
    """Write a grid of images to a .png, or the tensor to a .safetensors. Raises ValueError for other endings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"samples": samples.contiguous()}, path)
        return
    if path.suffix != ".png" or not is_image(samples):
        raise ValueError(
            f"Samples of shape {tuple(samples.shape[1:])} go to a .safetensors file"
            + (" or a .png" if is_image(samples) else "")
            + f", but --output is {path}."
        )
    pixels = as_pixels(samples)
    columns = math.ceil(len(pixels) ** 0.5)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
    rows = [torch.cat(list(pixels[i : i + columns]), dim=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def new_figure(width: float, height: float) -> "Figure":
    """A figure that needs no screen. Raises ImportError that says what to install."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only the demo needs it
    except ImportError as error:
        raise ImportError("The demo's pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def save_comparison(labelled: Sequence[tuple[str, Sample]], path: Path, gain: float = 4.0) -> None:
    """One labelled row of images per method, the same noise in every column, and its distance to the first row.

    The distance, on the right, is the absolute difference times `gain`.
    """
    reference, columns = labelled[0][1], len(labelled[0][1])
    figure = new_figure(4.5 + 1.3 * columns, 0.85 * len(labelled))
    axes = figure.subplots(len(labelled), 2, squeeze=False)
    for (axis, difference_axis), (label, samples) in zip(axes, labelled, strict=True):
        axis.imshow(torch.cat(list(as_pixels(samples)), dim=1).numpy())
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
        difference = gain * (samples - reference).abs() - 1  # black is no difference
        difference_axis.imshow(torch.cat(list(as_pixels(difference)), dim=1).numpy())
        for one in (axis, difference_axis):
            one.set(xticks=[], yticks=[])
    axes[0, 1].set_title(f"{gain:g} x distance to the teacher", fontsize=11)
    axes[0, 0].set_title("samples from the same noise", fontsize=11)
    figure.savefig(path, bbox_inches="tight")


def save_learned(learned: Sequence[Learned], path: Path) -> None:
    """Error at the end of every interval against the base solver's, and what was learned, plans with their spread."""
    figure = new_figure(12, 3.4 * len(learned))
    axes = figure.subplots(len(learned), 3, squeeze=False)
    for (error_axis, r_axis, scale_axis), one in zip(axes, learned, strict=True):
        places = range(1, len(one.levels))
        error_axis.plot(places, one.base_errors, "o--", color="tab:gray", label=one.base)
        error_axis.plot(places, one.errors, "o-", color="tab:blue", label=one.name)
        error_axis.set_xticks(
            list(places), [f"{i}\nto {level:.3g}" for i, level in zip(places, one.levels[1:], strict=True)]
        )
        error_axis.set(title=one.name, xlabel="interval, to sigma", ylabel="RMSE to the teacher", yscale="log")
        error_axis.legend()
        if one.weights:
            _weights(r_axis, scale_axis, one)
        else:
            _plans(r_axis, scale_axis, one)
    figure.savefig(path)


def _plans(r_axis: "Axes", scale_axis: "Axes", one: Learned) -> None:
    for axis, names, title in (
        (r_axis, ("r",), "learned midpoint r"),
        (scale_axis, ("scale_dir", "scale_time"), "learned scales"),
    ):
        for name in names:
            values = [plan[name].flatten() for plan in one.plans]
            axis.errorbar(
                range(1, len(values) + 1),
                [float(v.mean()) for v in values],
                [float(v.std()) for v in values],
                fmt="o-",
                capsize=4,
                label=name,
            )
        axis.set(title=title, xlabel="interval (mean and standard deviation)")
        axis.set_xticks(range(1, len(one.plans) + 1))
        axis.legend()
    r_axis.set_ylim(0, 1)
    r_axis.axhline(0.5, color="tab:gray", linestyle="--", linewidth=1)
    scale_axis.axhline(1.0, color="tab:gray", linestyle="--", linewidth=1)


def _weights(axis: "Axes", told_axis: "Axes", one: Learned) -> None:
    """Of a multistep table: a line per interval over the slopes that it adds up, and what the model is told."""
    for k, row in enumerate(one.weights):
        axis.plot(range(1, len(row) + 1), row, "o-", label=f"interval {k + 1}")
    axis.set(title="learned weights", xlabel="slope of interval")
    axis.set_xticks(range(1, len(one.weights) + 1))
    axis.axhline(0.0, color="tab:gray", linestyle="--", linewidth=1)
    axis.legend()
    told_axis.plot(range(1, len(one.told) + 1), one.told, "o-", label="told noise level / true one")
    told_axis.plot(range(1, len(one.first) + 1), one.first, "s-", label="weight of the first denoised sample")
    told_axis.axhline(1.0, color="tab:gray", linestyle="--", linewidth=1)
    told_axis.set(title="learned levels", xlabel="interval")
    told_axis.set_xticks(range(1, len(one.told) + 1))
    told_axis.legend()
