"""The update rules: history in, sample out. AMED-Solver and the solvers that AMED-Plugin improves.

With a midpoint an interval has two updates. AMED-Plugin (Zhou et al. 2024, section 3.4) runs the
base solver once to the learned midpoint and once to the end, and multiplies the second update by
scale_dir; the sample that is carried over is never scaled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .spectrum import combined
from .types import Evaluation, History, Sample, Sigma, Solver, Stage, StepPlan

TRUST = 0.5  # of CautiousIpndm: measured between 0.25 and 1 as nearly as good on smooth ODEs and safe on stiff ones
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _scale_dir(plan: StepPlan | None) -> Tensor | float:
    return 1.0 if plan is None else plan.scale_dir


def _euler(history: History, sigma: Sigma) -> Sample:
    start = history[-1]
    return start.x + (sigma - start.sigma) * start.slope


@dataclass(frozen=True)
class Amed(Solver):
    """AMED-Solver: the whole interval follows the slope found at the midpoint.

    x_next = x + scale_dir * (sigma_next - sigma) * slope(x_mid, scale_time * sigma_mid)
    """

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """Along the midpoint's slope; Euler's step where there is no midpoint."""
        del stage
        if plan is None:
            return _euler(history, sigma)
        start, mid = history[-2:]
        return start.x + plan.scale_dir * (sigma - start.sigma) * mid.slope


@dataclass(frozen=True)
class Dpm2(Solver):
    """DPM-Solver-2 (Lu et al. 2022a) in sigma; with its midpoint at the end (r = 1) it is Heun's method.

    x_next = x + scale_dir * (sigma_next - sigma) * (slope_mid / (2 r) + (1 - 1 / (2 r)) * slope)
    """

    divides_by_r: ClassVar[bool] = True

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """Along both slopes, weighed; Euler's step where there is no midpoint."""
        del stage
        if plan is None:
            return _euler(history, sigma)
        start, mid = history[-2:]
        weight = 1 / (2 * plan.r)
        slope = weight * mid.slope + (1 - weight) * start.slope
        return start.x + plan.scale_dir * (sigma - start.sigma) * slope


@dataclass(frozen=True)
class Ipndm(Solver):
    """Improved PNDM (Zhang & Chen 2023): Adams-Bashforth weights, used also on uneven grids.

    Order 1 is Euler's method, which is DDIM. An update that ends at sigma = 0 is of order 1.
    """

    max_order: int = 4

    def __post_init__(self) -> None:
        _check_order(self.max_order, len(ADAMS_BASHFORTH), "iPNDM")

    @property
    def memory(self) -> int:
        """One evaluation less than its order."""
        return self.max_order - 1

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """The step of the highest order that the history allows."""
        order = 1 if stage.to_zero else min(self.max_order, len(history))
        newest_first = history[::-1]
        weighted = [w * e.slope for w, e in zip(ADAMS_BASHFORTH[order - 1], newest_first, strict=False)]
        start = newest_first[0]
        return start.x + _scale_dir(plan) * (sigma - start.sigma) * sum(weighted[1:], weighted[0])


@dataclass(frozen=True)
class CautiousIpndm(Ipndm):
    """iPNDM whose order every sample chooses anew in every step, from the slopes at hand: for teachers.

    The next order is taken only while it changes the increment by less, TRUST times, than the one before did. Where
    guidance makes the ODE stiff, high orders overshoot, and their changes grow. An update that ends at sigma = 0 may
    have any order.
    """

    max_order: int = 3

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """The step of the highest order that each sample may trust."""
        del stage
        newest_first = [e.slope for e in history[::-1][: self.max_order]]
        start, taken = history[-1], newest_first[0]
        before, trusted = _norms(taken), torch.ones_like(_norms(taken), dtype=torch.bool)
        lower = taken
        for weights in ADAMS_BASHFORTH[1 : len(newest_first)]:
            higher = sum((w * slope for w, slope in zip(weights, newest_first, strict=False)), torch.zeros_like(taken))
            change = _norms(higher - lower)
            trusted = trusted & (change < TRUST * before)
            taken, before, lower = torch.where(trusted, higher, taken), change, higher
        return start.x + _scale_dir(plan) * (sigma - start.sigma) * taken


def _norms(x: Sample) -> Tensor:
    """Of every sample (batch, 1, ..., 1)."""
    norms: Tensor = x.float().flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class DpmSolverPP(Solver):
    """Multistep DPM-Solver++ (Lu et al. 2022b) of order 1 to 3, predicting data or noise.

    With lambda = ln(alpha / sigma), h the step in lambda, m the data prediction D and k = 0 the newest:
    x_next = sigma_next / sigma * x - alpha_next (phi_1 m_0 + ...), phi_1 = exp(-h) - 1, and the same with
    exp(h) for the noise prediction (x - D) / sigma. alpha is 1 where x = x0 + sigma noise (eps, v, EDM
    models in ComfyUI's sigma), and 1 - sigma with `flow`, where x = (1 - sigma) x0 + sigma noise; there
    lambda is -infinity at sigma = 1, and the terms that divide by an infinite step vanish.
    `lower_order_final` lowers the order over the last updates, counted in updates (two per
    planned interval). `thresholding` clamps the data prediction as in Imagen: for pixel models.
    """

    max_order: int = 3
    prediction: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    thresholding: bool = False
    flow: bool = False
    divides_by_r: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_order(self.max_order, 3, "DPM-Solver++")
        if self.flow and self.prediction == "noise":
            raise ValueError('At sigma = 1 a flow model has no noise prediction to step by: set prediction to "data".')
        if self.prediction not in ("data", "noise"):
            raise ValueError(f'DPM-Solver++ predicts "data" or "noise", but found {self.prediction!r}.')
        if self.thresholding and self.prediction == "noise":
            raise ValueError('Dynamic thresholding works on the data prediction: set prediction to "data".')

    @property
    def memory(self) -> int:
        """One evaluation less than its order."""
        return self.max_order - 1

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """The step of the highest order that is allowed; at sigma = 0 its limit, of order 1."""
        used = history[-self._order(len(history), stage) :][::-1]  # newest first
        start = used[0]
        data = self.prediction == "data"
        if stage.to_zero:  # h is infinite; the update is of order 1 and has this limit
            scaled = _scale_dir(plan) * self._model(start)
            return scaled if data else start.x - start.sigma * scaled
        m = [self._model(e) for e in used]
        lambdas = [self._half_log_snr(e.sigma) for e in used]
        h = self._half_log_snr(sigma) - lambdas[0]
        # The two predictions share one formula: sign and carry differ.
        alpha = 1 - sigma if self.flow else 1.0
        sign, carried, gain = (-1, sigma / start.sigma * start.x, alpha) if data else (1, start.x, sigma)
        phi_1 = torch.expm1(sign * h)
        update = phi_1 * m[0]
        if len(used) == 2:
            update = update + 0.5 * phi_1 * (m[0] - m[1]) * h / (lambdas[0] - lambdas[1])
        elif len(used) == 3:
            # The papers' r0 and r1, inverted: with flow the older step may be infinite.
            inverse_0, inverse_1 = h / (lambdas[0] - lambdas[1]), h / (lambdas[1] - lambdas[2])
            d1_0, d1_1 = (m[0] - m[1]) * inverse_0, (m[1] - m[2]) * inverse_1
            older = inverse_1 / (inverse_0 + inverse_1)
            d1 = d1_0 + older * (d1_0 - d1_1)
            d2 = older * inverse_0 * (d1_0 - d1_1)
            phi_2 = phi_1 / h - sign
            phi_3 = phi_2 / h - 0.5
            update = update + sign * phi_2 * d1 + phi_3 * d2
        return carried - _scale_dir(plan) * gain * update

    def _half_log_snr(self, sigma: Sigma) -> Tensor:
        return ((1 - sigma) / sigma).log() if self.flow else -sigma.log()

    def _order(self, available: int, stage: Stage) -> int:
        if stage.to_zero:
            return 1
        order = min(self.max_order, available)
        # As in DPM-Solver's own code, the drop begins only after the first updates have built the order up.
        if self.lower_order_final and stage.index >= self.max_order:
            order = min(order, stage.count - stage.index + 1)
        return order

    def _model(self, evaluation: Evaluation) -> Tensor:
        if self.prediction == "noise":
            return evaluation.slope
        return dynamic_threshold(evaluation.denoised) if self.thresholding else evaluation.denoised


@dataclass(frozen=True)
class Restarted(Solver):
    """A solver with one update per interval that forgets, at the start of interval `switch`, all that came before.

    There another model answers, whose slopes do not go on from those of the first.
    """

    solver: Solver
    switch: int

    @property
    def memory(self) -> int:
        """What the solver remembers; across the switch, nothing."""
        return self.solver.memory

    def to_mid(self, history: History, sigma: Sigma, stage: Stage) -> Sample:
        """Raises ValueError: there are no midpoints."""
        del history, sigma, stage
        raise ValueError("A solver that restarts has one update per interval: its planner must have no midpoints.")

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """The solver's own step, from what the model that answers now has answered."""
        interval = stage.interval - self.switch
        if interval < 0:
            return self.solver.to_next(history, sigma, plan, stage)
        own = Stage(interval, interval + 1, stage.count - self.switch, stage.to_zero)
        return self.solver.to_next(history[-(interval + 1) :], sigma, plan, own)


def restarted(solver: Solver, switch: int) -> Solver:
    """The solver, or one that restarts at an interval."""
    return Restarted(solver, switch) if switch else solver


@dataclass(frozen=True)
class Multistep(Solver):
    """A linear multistep method with weights of its own for every interval (Shaul et al. 2024: non-stationary solvers).

    In interval k: x_next = x + (sigma_next - sigma) * (w_k0 slope_0 + ... + w_kk slope_k + v_k denoised_0). iPNDM,
    DEIS, DPM-Solver++ and all the solvers with midpoints are of this form, each with weights that follow from its
    grid and v = 0. With the first denoised sample, which is the starting noise less its slope times its level,
    it is any linear combination of the starting noise and of what the model has answered. A guided model answers
    twice; u_kj guidance_slope_j, added in the same way, makes it any combination of all answers: u_kk changes the
    guidance scale of a step, the others how the guidance of earlier steps goes on. Where a call asks no negative, its
    slope is the conditional one, and these others carry on what guidance adds. From interval `switch` on, if there is
    a second model, the sums are of its own answers alone.
    """

    weights: tuple[tuple[float, ...], ...]  # of interval k: of all slopes that it knows, the oldest's first
    first: tuple[float, ...] = ()  # v of every interval; none are zeros
    guided: tuple[tuple[float, ...], ...] = ()  # u, as the weights, of the calls that ask; none are zeros
    negatives: tuple[int, ...] | None = None  # the intervals whose calls ask the negative; None: all
    # What all these weights differ by in each band of frequency (vectors, BANDS), of every interval; none are zeros.
    spectral: tuple[Tensor, ...] = ()
    switch: int = 0

    @property
    def memory(self) -> int:
        """All evaluations of the run."""
        return len(self.weights) - 1

    def to_mid(self, history: History, sigma: Sigma, stage: Stage) -> Sample:
        """Raises ValueError: there are no midpoints."""
        del history, sigma, stage
        raise ValueError("A learned multistep method has no midpoints: its planner must be MultistepTable's.")

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """The learned sum of all that the model has answered.

        Raises ValueError if it is guided and the model did not show its two answers.
        """
        del plan
        start, k = history[-1], stage.interval
        weights = (*self.weights[k], self.first[k] if self.first else 0.0, *(self.guided[k] if self.guided else ()))
        known = history[self.switch :] if k >= self.switch else history
        vectors = multistep_vectors(known, self._guided_of(range(k + 1 - len(known), k + 1)))
        weighted = [w * vector for w, vector in zip(weights, vectors, strict=True) if w]
        slope = sum(weighted[1:], weighted[0]) if weighted else torch.zeros_like(start.x)
        if self.spectral:
            slope = slope + combined(vectors, self.spectral[k])
        return start.x + (sigma - start.sigma) * slope

    def _guided_of(self, known: range) -> list[int]:
        """Which of these intervals have a guidance slope, counted from the first of them."""
        if not self.guided:
            return []
        return [j - known.start for j in known if self.negatives is None or j in self.negatives]


def multistep_vectors(history: History, guided: Sequence[int] = ()) -> list[Sample]:
    """What a learned multistep method adds up, each (batch, ...): slopes, the first denoised sample, guidance slopes.

    These are of the evaluations number `guided`. Raises ValueError if the model did not show its two answers there.
    """
    return [*(e.slope for e in history), history[0].denoised, *(history[j].guidance_slope for j in guided)]


def dynamic_threshold(denoised: Sample, quantile: float = 0.995, floor: float = 1.0) -> Sample:
    """Clamp samples (batch, ...) to their own quantile s >= floor, and divide by s.

    From Imagen (Saharia et al. 2022, section 2.3), for the data prediction of pixel models.
    """
    flat = denoised.abs().flatten(1)
    # torch.quantile refuses more than 16 million elements; two order statistics are the same thing.
    position = quantile * (flat.shape[1] - 1)
    low = int(position)
    largest = flat.topk(flat.shape[1] - low, dim=1).values  # the low-th smallest comes last
    above = largest[:, max(largest.shape[1] - 2, 0)]
    s = torch.lerp(largest[:, -1], above, position - low).clamp(min=floor)
    s = s.reshape(-1, *[1] * (denoised.ndim - 1))
    return denoised.clamp(-s, s) / s


def _check_order(order: int, highest: int, name: str) -> None:
    if order not in range(1, highest + 1):
        raise ValueError(f"{name} has orders 1 to {highest}, but max_order is {order}.")


# What a predictor file calls the solvers that take a midpoint: their class, and the options that the name fixes.
SOLVERS: dict[str, tuple[type[Any], dict[str, object]]] = {
    "amed": (Amed, {}),
    "euler": (Ipndm, {"max_order": 1}),
    "dpm_2": (Dpm2, {}),
    "ipndm": (Ipndm, {}),
    "dpmpp": (DpmSolverPP, {}),
}


def solver(name: str, settings: Mapping[str, object] | None = None) -> Solver:
    """Build a solver by name, with those of the `settings` that it has.

    Raises ValueError that lists the valid names.
    """
    if name not in SOLVERS:
        raise ValueError(f"There is no solver {name!r}. Choose one of: {', '.join(SOLVERS)}.")
    made, fixed = SOLVERS[name]
    known = {field.name for field in fields(made)}
    chosen: dict[str, Any] = {key: value for key, value in (settings or {}).items() if key in known} | fixed
    built: Solver = made(**chosen)
    return built
