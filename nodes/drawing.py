"""Runs a method where ComfyUI runs a sampler, and tells ComfyUI how far it is."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.utils
import torch
from tqdm.auto import tqdm

from ..amed_core.driver import Total, answers_of, raise_if_not_finite, trajectory
from ..amed_core.types import Method, Sample, Sigma
from .bridge import ComfyDenoiser

Callback = Callable[[dict[str, Any]], None]


def draw(
    model: Any,
    x: Sample,
    levels: Sequence[float],
    method: Method,
    extra_args: dict[str, Any],
    callback: Callback | None,
    disable: bool | None,
    *,
    bottleneck: bool = False,
    guidance: float | None = None,
) -> Sample:
    """The sample at the end of a method, from noisy `x` (batch, ...) at its first level.

    `levels` is the list that ComfyUI gave for the run, one entry per call and one for the end.
    Raises FloatingPointError if the model answered NaN or infinity, or if the sample itself is not finite.
    """
    mask, to_zero, calls = extra_args.get("denoise_mask"), method.sigmas[-1] == 0, len(levels) - 1
    begin = time.monotonic()
    with tqdm(total=calls, disable=disable) as bar:
        report = Report(callback, bar, calls if to_zero else 0)
        denoiser = ComfyDenoiser(
            model,
            extra_args,
            sorted({*levels, *method.sigmas}, reverse=True),
            bottleneck=bottleneck,
            guidance=guidance,
            per_call=True,
            on_call=report,
        )
        answers: list[Total] = []
        for step in trajectory(denoiser, x, method):
            answers += answers_of(step)
            x = step.x
            if mask is not None and step.index == len(method.sigmas) - 2 and to_zero:
                x = torch.where(mask > 0, x, step.start.denoised)  # masked pixels are exact in the last answer
            del step  # its evaluations need not live through the next model call
        report.finish(x)
    raise_if_not_finite(answers, x)
    passes, seconds = round(denoiser.passes / len(x)), time.monotonic() - begin
    logging.info(f"AMED: {denoiser.calls} model calls, {passes} passes of the network, {seconds:.1f} s")
    return x


class Report:
    """Tells ComfyUI of every model call as it comes.

    In a run to 0 it tells of the `last` call with the finished sample in place of the model's answer. Previews and
    `denoised_output` show that. A learned last step is nearer to the truth than the answer itself.
    """

    def __init__(self, callback: Callback | None, bar: Any, last: int) -> None:
        self.callback = callback
        self.bar = bar
        self.last = last  # 0 if the run ends above 0
        self.calls = 0
        self.held: dict[str, Any] = {}

    def __call__(self, x: Sample, sigma: Sigma, denoised: Sample) -> None:
        told = {"x": x, "i": self.calls, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}
        self.calls += 1
        if self.calls == self.last:
            self.held = told
        else:
            self._tell(told)

    def finish(self, x: Sample) -> None:
        """The run is over, and this is its sample."""
        if self.held:
            self._tell({**self.held, "denoised": x})

    def _tell(self, told: dict[str, Any]) -> None:
        if self.callback is not None:
            self.callback(told)
        self.bar.update()


class LearningReport:
    """Tells ComfyUI of a slow run, whose picture it shows, and of the calls after it that learn, which show nothing.

    ComfyUI's callback knows `steps` steps and no more: it hears of so many, spread over the slow run. The bars count
    the calls that really come.
    """

    def __init__(self, callback: Callback | None, bar: Any, steps: int, slow_calls: int, to_zero: bool) -> None:
        self.callback = callback
        self.bar = bar
        self.steps = steps
        self.slow_calls = slow_calls
        self.to_zero = to_zero
        self.browser = comfy.utils.ProgressBar(bar.total)
        self.calls = 0
        self.last: dict[str, Any] = {}
        self.answers: list[Total] = []  # of the calls after the slow run

    def __call__(self, x: Sample, sigma: Sigma, denoised: Sample) -> None:
        self.calls += 1
        if self.calls > self.slow_calls:
            self.answers.append((0, self.calls - 1, denoised.sum(dtype=torch.float32)))
        else:
            heard = self.calls * self.steps // self.slow_calls
            told = {"x": x, "i": heard - 1, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised}
            if self.calls == self.slow_calls:
                self.last = told
                if self.to_zero:
                    return
            if self.callback is not None and heard > (self.calls - 1) * self.steps // self.slow_calls:
                self.callback(told)
        self._count()

    def expect(self, more: int) -> None:
        """So many calls come after the slow run."""
        self.bar.total = self.slow_calls + more
        self.bar.refresh()

    def show(self, x: Sample) -> None:
        """The slow run is over, and this is its sample."""
        if self.to_zero:
            if self.callback is not None:
                self.callback({**self.last, "denoised": x})
            self._count()

    def finish(self) -> None:
        """There were no more calls than these, whatever was expected."""
        self.bar.total = self.calls
        self.bar.refresh()
        self.browser.update_absolute(self.calls, self.calls)

    def _count(self) -> None:
        self.bar.update()
        self.browser.update_absolute(self.calls, self.bar.total)
