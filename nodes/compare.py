"""Is it any good on my model? One picture that shows it, and a sentence that says it."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from .comparison import (
    LEAST_TIMES,
    NODE,
    SEEDS,
    TAUGHT,
    TAUGHT_FROM,
    Comparison,
    Ours,
    Result,
    pairs_of,
    steps_of,
    streams_of,
    usual_teacher_calls,
)
from .pairing import refuse_unfit
from .previews import previewer_of
from .sheets import BEST, INK, MUTED, OURS, Block, Line, as_image, error_plot, sheet
from .training_inputs import defaults
from .values import CATEGORY, WARNING, PredictorSocket, fold, say, schema, settings, tell

AGAINST = "dpmpp_2m karras, uni_pc_bh2 kl_optimal, euler simple"
ADVANCED = ("teacher_calls", "amplify")
LEAST_STEPS = "2"  # as steps may be that come from another node


class AMEDCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDCompare",
            display_name="AMED Compare",
            category=CATEGORY,
            description="Is it any good on my model? Draws the same noises by a slow teacher, by stock samplers and "
            "by AMED, in equally many model calls, and shows the pictures, how far each is from the teacher, and how "
            "many calls of the best stock sampler are as near. AMED is the connected predictor, else the one that the "
            'MODEL carries, else what the sampler "amed" learns here from two pictures of other seeds.',
            inputs=fold(_inputs(), ADVANCED),
            outputs=[
                io.Image.Output(
                    display_name="comparison",
                    tooltip="The sheet: a row for each method, and beside it the differences to the teacher.",
                ),
                io.Image.Output(display_name="plot", tooltip="Errors over model calls, both logarithmic."),
                io.String.Output(
                    display_name="table", tooltip="The verdict, how it was measured, and all errors. For Preview Any."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, steps: str = LEAST_STEPS, against: str = AGAINST, teacher_calls: int = 0) -> bool | str:
        try:
            _teacher_calls(teacher_calls, steps_of(steps))
            pairs_of(against)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, latent_image: Any, seed: int, steps: str, pictures: int, **more: Any) -> io.NodeOutput:
        given = defaults(_inputs()) | more
        begin, numbers = time.monotonic(), steps_of(steps)
        refuse_unfit(model)
        compared = Comparison(
            model,
            given["positive"],
            given["negative"],
            latent_image,
            tuple((seed + n) % SEEDS for n in range(pictures)),
            given["cfg"],
            numbers,
            pairs_of(given["against"]),
            Ours.of(model, given["predictor"]),
            _teacher_calls(given["teacher_calls"], numbers),
            partial(tell, cls),
        )
        _refuse_other_vae(given["vae"], compared)
        compared.run()
        said = [verdict(compared, calls) for calls in numbers]
        drawn = _sheet(compared, said, Decoder(model, given["vae"]), given["amplify"])
        image = as_image(drawn)
        say(cls, f"{in_short(compared, numbers[0])} {said[0]}")
        text = table(compared, said, time.monotonic() - begin)
        return io.NodeOutput(image, _plot(compared, said[0]), text, ui=ui.PreviewImage(image, cls=cls))


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to sample with, after its LoRAs and shift, as for KSampler."),
        io.Conditioning.Input("positive", tooltip="A prompt that is typical of what you ask for."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you use."),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent of the size you sample. Its content and its batch are not used: pictures says "
            "how many are drawn.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of the first picture; the others have the seeds after it. Each picture is the one that KSampler "
            "draws of its seed, with one picture in the batch. Take seeds that taught AMED nothing.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="The cfg you sample with. A predictor is good near the cfg it was made for.",
        ),
        io.String.Input(
            "steps",
            default="5",
            tooltip="Model calls per picture: a number, as 5, or several, as 3 5 8. Samplers with two calls a step "
            "take half as many steps.",
        ),
        io.Int.Input(
            "pictures",
            default=4,
            min=1,
            max=32,
            tooltip="How many are drawn by every method. 4 give an impression, 16 a sound error.",
        ),
        io.String.Input(
            "against",
            default=AGAINST,
            tooltip="Stock samplers, each with its scheduler, by their names in KSampler; commas between the pairs. "
            "Samplers that add noise of their own are refused: their pictures are others than the teacher's.",
        ),
        *_optional(),
    ]


def _optional() -> list[Any]:
    return [
        PredictorSocket.Input(
            "predictor",
            optional=True,
            tooltip='What is compared. Without one it is what the MODEL carries from "AMED Apply Predictor"; else the '
            f'sampler "amed" is taught here, on {TAUGHT} pictures of other seeds, for each number of steps.',
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="Decodes the pictures. Without one they are shown as previews are, which is coarse. Of a video "
            "the middle frame is shown.",
        ),
        io.Int.Input(
            "teacher_calls",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Model calls of the teacher, to whose pictures all distances are. 0: 60, or 6 times the steps "
            "where that is more.",
        ),
        io.Float.Input(
            "amplify",
            default=4.0,
            min=0.1,
            max=100.0,
            step=0.5,
            round=0.1,
            optional=True,
            tooltip="How many times the differences to the teacher are shown. Black is no difference.",
        ),
    ]


def _teacher_calls(given: int, steps: Sequence[int]) -> int:
    if given and given < LEAST_TIMES * max(steps):
        raise ValueError(
            f"A teacher of {given} calls cannot judge {max(steps)} calls. Set teacher_calls to 0, or to at least "
            f'{LEAST_TIMES * max(steps)}, in "{NODE}".'
        )
    return given or usual_teacher_calls(steps)


def verdict(compared: Comparison, calls: int) -> str:
    """Which is nearer to the teacher in so many calls, and by how much."""
    best, mine = compared.best(calls), compared.mine(calls)
    errors, count = f"error {mine.error:.3g} against {best.error:.3g}", len(mine.squares)
    errors += f", nearer in {nearer(mine, best)} of {count} pictures" if count > 1 else ""
    if not math.isfinite(mine.error):
        return f"{calls} calls of AMED gave no picture (NaN)."
    if mine.error > best.error:
        return (
            f"{calls} calls of {best.name} are nearer to the teacher than {calls} of AMED: stock is better here; "
            f"{errors}."
        )
    if math.isinf(compared.equal(calls)):
        most = compared.ladders[calls][-1][0]
        return f"{calls} calls of AMED are nearer to the teacher than {most} of {best.name}; {errors}."
    return f"{calls} calls of AMED are as near to the teacher as {_equal(compared, calls)} of {best.name}; {errors}."


def in_short(compared: Comparison, calls: int) -> str:
    """The verdict in few words, for the node."""
    best, mine = compared.best(calls), compared.mine(calls)
    if not math.isfinite(mine.error):
        return f"{WARNING} AMED gave no picture."
    if mine.error > best.error:
        return f"{WARNING} {best.name} is better here."
    if math.isinf(compared.equal(calls)):
        return f"{calls} calls beat {compared.ladders[calls][-1][0]} of {best.name}."
    return f"{calls} calls equal {_equal(compared, calls)} of {best.name}."


def _equal(compared: Comparison, calls: int) -> str:
    """In how many calls the best stock pair is as near, in words."""
    found = compared.equal(calls)
    if math.isinf(found):
        return f"over {compared.ladders[calls][-1][0]}"
    return f"{found:.0f}" if found >= 10 else f"{found:.1f}".removesuffix(".0")


def nearer(mine: Result, other: Result) -> int:
    """In how many pictures one is nearer to the teacher than another."""
    return sum(a < b for a, b in zip(mine.squares, other.squares, strict=True))


class Decoder:
    """Latents as pictures: by a VAE, else as previews are, else the channels as they are."""

    def __init__(self, model: Any, vae: Any) -> None:
        self.model = model
        self.vae = vae
        self.previewer = previewer_of(model.load_device, model.model.latent_format)

    def __call__(self, latent: Any) -> Tensor:
        """The picture (height, width, 3) in [0, 1] of one latent; of a video the middle frame."""
        if self.vae is not None:
            try:
                return self._by_vae(_still(latent.unbind()[0] if latent.is_nested else latent))
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception as error:  # what was measured is worth more than its looks
                logging.warning(f"AMED: the VAE does not decode this, so pictures are shown as previews: {error}")
                self.vae = None
        first = _still(streams_of(self.model, latent)[0])
        if self.previewer is None or first.ndim not in (4, 5):
            return _channels(first)
        shown = self.previewer.decode_latent_to_preview(first.to(self.model.load_device)).convert("RGB")
        return as_image(shown)[0]

    def _by_vae(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(latent).float().cpu()
        frames = decoded.reshape(-1, *decoded.shape[-3:])
        picture = frames[len(frames) // 2][..., :3]
        return picture.expand(-1, -1, 3)


def _still(latent: Tensor) -> Tensor:
    """The middle frame (1, channels, [1,] ...) of a latent."""
    middle = latent[len(latent) // 2 :][:1]  # a batch is one video's frames
    return middle[:, :, middle.shape[2] // 2 :][:, :, :1] if middle.ndim == 5 else middle


def _channels(latent: Tensor) -> Tensor:
    """What no decoder knows, as a picture: the first three channels, or channels over time."""
    flat = latent[0].float()
    flat = flat[:, 0] if flat.ndim == 4 else flat
    shown = flat[:3].movedim(0, -1) if flat.ndim == 3 and len(flat) >= 3 else (flat[0] if flat.ndim == 3 else flat)
    shown = shown if shown.ndim == 3 else torch.atleast_2d(shown)[..., None].expand(-1, -1, 3)
    return (shown / 4 + 0.5).clamp(0, 1)  # two standard deviations to each side


def _refuse_other_vae(vae: Any, compared: Comparison) -> None:
    """Raise ValueError for a VAE of other channels, before anything is drawn."""
    latent = compared.latent.unbind()[0] if compared.latent.is_nested else compared.latent
    channels = getattr(vae, "latent_channels", latent.shape[1])
    if channels != latent.shape[1]:
        raise ValueError(
            f"The VAE decodes latents of {channels} channels, and this model's have {latent.shape[1]}. Connect the "
            f'model\'s own VAE to vae of "{NODE}", or disconnect it.'
        )


def _sheet(compared: Comparison, said: Sequence[str], decode: Decoder, amplify: float) -> Any:
    slow = tuple(map(decode, compared.slow.latents))
    blocks = []
    for calls in compared.steps:
        best, mine = compared.best(calls), compared.mine(calls)
        cost = f"{compared.slow.calls} calls, {compared.slow.seconds:.2g} s a picture"
        lines = [Line("Teacher", (cost,), slow, color=MUTED)]
        for one in (*compared.of(calls), mine):
            pictures = tuple(map(decode, one.latents))
            apart = tuple((a - b).abs() * amplify for a, b in zip(pictures, slow, strict=True))
            color = OURS if one is mine else BEST if one is best else INK
            lines.append(Line(one.name, _notes(compared, calls, one), pictures, apart, one.error, color))
        blocks.append(Block(f"{calls} model calls", tuple(lines)))
    headline = said[0]
    if len(said) > 1:
        headline = f"AMED beside stock samplers in {', '.join(map(str, compared.steps))} model calls"
        blocks = [replace(block, title=text) for block, text in zip(blocks, said, strict=True)]
    return sheet(headline, about(compared), f"difference to the teacher, {amplify:g} times", blocks)


def _notes(compared: Comparison, calls: int, one: Result) -> tuple[str, ...]:
    best, mine = compared.best(calls), compared.mine(calls)
    notes = [f"error {one.error:.3g}" if math.isfinite(one.error) else "no picture (NaN)"]
    if one is mine:
        if mine.error <= best.error:
            notes.append(f"= {_equal(compared, calls)} calls of {best.name}")
        notes.append(f"nearer in {nearer(mine, best)} of {len(mine.squares)} pictures")
    elif one is best:
        notes.append("the nearest of the stock pairs")
    return (*notes, f"{one.seconds:.2g} s a picture")


def _plot(compared: Comparison, title: str) -> Tensor:
    every: dict[str, list[tuple[int, float]]] = {}
    for one in compared.results.values():
        every.setdefault(one.name, []).append((one.calls, one.error))
    return as_image(error_plot(title, compared.ours.name, every))


def about(compared: Comparison) -> str:
    """What was measured, as sentences."""
    seeds, shape = compared.seeds, compared.latent
    many = f"{len(seeds)} pictures, seeds {seeds[0]} to" if len(seeds) > 1 else "1 picture, seed"
    size = " and ".join(
        " x ".join(map(str, part.shape[1:])) for part in (shape.unbind() if shape.is_nested else [shape])
    )
    family = type(compared.model.model.model_config).__name__
    return (
        f"{family}, cfg {compared.cfg:g}, latents of {size}. {many} {seeds[-1]}, each from the same noise by every "
        f"method. Errors are RMSEs of latents to the teacher, {compared.slow.calls} calls of a slow sampler on a fine "
        "grid."
    )


def learned(compared: Comparison) -> str:
    """What AMED is here, as a sentence."""
    ours = compared.ours
    if ours.predictor is not None and not any(slow for slow, _ in compared.taught.values()):
        return f"{ours.name} is a predictor for {settings(ours.predictor)}."
    if not compared.taught:
        return f"{ours.name} takes plain calls: AMED Learn says never."
    told = [
        f"{slow} picture{'s' * (slow != 1)} in {spent} model calls for {calls} calls a picture"
        for calls, (slow, spent) in compared.taught.items()
        if slow
    ]
    if not told:
        return f"{ours.name} draws as it learned before, from seeds that it did not keep; nothing was taught here."
    seed = (compared.seeds[0] + TAUGHT_FROM) % SEEDS
    return f"{ours.name} was taught first, on this prompt and seeds from {seed} on: {'; '.join(told)}."


def table(compared: Comparison, said: Sequence[str], seconds: float) -> str:
    """All that was measured, the verdict first."""
    lines = [*said, about(compared)]
    lines.append(f"{learned(compared)} {compared.meter.done:,} model calls in all, {seconds:.0f} s.")
    if compared.lacking:
        lines.append(f"Left out: {'; '.join(compared.lacking)}.")
    width = max(len(one.name) for one in compared.results.values())
    lines += ["", f"{'calls':>5}  {'method':<{width}}  {'error':>8}  {'s a picture':>11}  error of each picture"]
    for one in sorted(compared.results.values(), key=lambda one: (one.calls, one.error)):
        each = " ".join(f"{math.sqrt(square):.3g}" for square in one.squares)
        lines.append(f"{one.calls:>5}  {one.name:<{width}}  {one.error:>8.4f}  {one.seconds:>11.3g}  {each}")
    return "\n".join(lines)
