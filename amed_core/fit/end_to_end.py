"""Fitting to the end of the trajectory: the error of the finished sample, without a gradient through the model.

A plan has a handful of numbers, and a number's derivative is the difference of two sampling runs that
part where it acts. With the derivatives J of every sample's end by its own numbers, the squared error
|e + J delta|^2 is known for all small changes, with no further model call. A table takes the best
change for all samples (Gauss-Newton, damped as by Levenberg and Marquardt), a network is trained to take
every sample's own. Then both are measured, and expanded again where they are now.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..driver import Decided, Resume
from ..features import LOOKS, Look
from ..midpoints import COLUMNS, TablePredictor, untrained_table
from ..network import AMEDPredictor
from ..predictor import AnyPredictor
from ..types import Evaluation, Sample, Sigma, Source, Step, StepPlan
from .protocol import FitConfig, FitEvent, refuse_other_settings
from .runs import moved_to
from .targets import Goal, Goals, ends
from .trajectories import HELD_OUT, Metered
from .workers import ALONE, Workers

DIFFERENCE = 2e-2  # of every number, for the derivatives
DAMPING, NETWORK_DAMPING, EASIER, HARDER = 1e-2, 1.0, 0.2, 5.0  # Levenberg's and Marquardt's
ATTEMPTS, NETWORK_ATTEMPTS = 5, 2  # at a smaller error, per iteration
LEARNING_RATE = 3e-3  # of Adam, on what the plans of a network are known to do


@dataclass(frozen=True)
class Expansion:
    """What small changes of its plans do to a batch: end(delta) = end + J delta, sample by sample.

    The numbers of a plan lie interval by interval and in each in the order of COLUMNS, the fixed ones left out.
    """

    group: int
    normal: Tensor  # J^T J (batch, numbers, numbers), in float64
    gradient: Tensor  # J^T e (batch, numbers), e the distance from the goal
    numbers: Tensor  # (batch, numbers), where it was expanded
    seen: Sequence[Tensor]  # what a network saw before every planned interval

    def change_of_error(self, change: Tensor) -> Tensor:
        """By how much the summed squared error changes with the numbers' `change` (batch, numbers)."""
        quadratic = torch.einsum("ni,nij,nj->", change, self.normal, change)
        return quadratic + 2 * (self.gradient * change).sum()


class EndToEnd:
    """Fits a table, or a network that corrects one, to where the converged teacher takes the same noise.

    `sources` are one per guidance scale of the predictor's config. Model calls and the teacher's samples are never
    made twice. Nothing but the predictor and this object changes.
    """

    def __init__(
        self,
        predictor: AnyPredictor,
        sources: Source | Sequence[Source],
        config: FitConfig,
        look: Look | None = None,
        workers: Workers = ALONE,
    ) -> None:
        settings = predictor.config
        listed = (sources,) if callable(sources) else tuple(sources)
        if len(listed) != max(len(settings.guidances), 1):
            raise ValueError(f"There are {len(listed)} sources for guidance scales {list(settings.guidances)}.")
        self.predictor = predictor
        self.config = config
        self.workers = workers
        self.look = look or LOOKS[settings.features]
        self.metered = [Metered(source) for source in listed]
        shared = (config.batch_size, settings, config.teacher_calls, workers)
        self.fitted = Goals(self.metered, range(config.trajectories), *shared)
        self.judged = Goals(self.metered, range(HELD_OUT, HELD_OUT + config.held_out), *shared)
        self.solver = settings.build_solver()
        self.grid = torch.tensor(settings.sigmas, dtype=torch.float64)
        low, high = (
            torch.tensor(bound, dtype=torch.float64).repeat(settings.planned)
            for bound in zip(*settings.bounds, strict=True)
        )
        self.free = high > low  # a column without a range keeps its value
        self.low, self.high = low[self.free], high[self.free]
        # What a state holds: the predictor under way, how it does, and the best so far.
        self.current = copy.deepcopy(predictor)
        self.iteration = 0
        self.damping: Tensor = torch.empty(0)
        self.error: Tensor = torch.empty(0)
        self.best: Tensor = torch.empty(0)
        self.base: Tensor = torch.empty(0)
        self.done = False
        self.history: list[list[float]] = []  # error and held-out error of every iteration
        self.optimizer: dict[str, Any] | None = None
        self._earlier_calls = 0
        self._runs: dict[int, list[Step]] = {}  # of the current predictor, on the CPU, to be expanded around

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + sum(metered.calls for metered in self.metered)

    @property
    def floor(self) -> int:
        """The fewest model calls, on paper, of this fit's iterations so far (at least 1), for this worker's share."""
        return self.calls_of(max(self.iteration, 1))

    def calls_of(self, iterations: int) -> int:
        """The fewest model calls that so many iterations take, for this worker's share of the trajectories.

        The teacher, the error before, and the base solver's plain calls; per iteration, every number's calls that
        come after it, and one attempt at a smaller error. Runs are expanded around where they were measured.
        """
        config = self.predictor.config
        fitted, judged = (sum(len(rows) for _, rows in goals.batches()) for goals in (self.fitted, self.judged))
        once = self.fitted.floor + self.judged.floor + (fitted + 2 * judged) * config.calls
        starts = [2 * k - config.analytic_first_step for k in range(config.planned)]  # calls before an interval's
        after = [config.calls - start - 1 for start in starts]  # from its midpoint on
        widths = [high > low for low, high in config.bounds]
        derivatives = sum(n * (widths[0] + widths[2]) + (n - 1) * widths[1] for n in after)
        return once + iterations * (fitted * (derivatives + config.calls) + judged * config.calls)

    @property
    def guidances(self) -> list[float | None]:
        """The guidance scale of every group of goals."""
        return list(self.predictor.config.guidances) or [None]

    def events(self) -> Iterator[FitEvent]:
        """Fit, one iteration per event; the predictor is the best so far, judged on what is held out.

        Leave the loop to cancel; call again to go on. Raises FloatingPointError if the base solver's
        samples are not finite.
        """
        if not self.history:
            with torch.no_grad():
                yield self._begin()
        while not self.done and self.iteration < self.config.iterations:
            if self.config.gradient == "reverse":
                with torch.enable_grad():
                    trial, error = self._descended()
                accepted = torch.ones_like(error, dtype=torch.bool)
                damping = self.damping
            else:
                with torch.no_grad():
                    trial, error, accepted, damping = self._improved()
            with torch.no_grad():
                judged, event = self._judge(trial, error)
            gained = (error < (1 - self.config.tolerance) * self.error) & accepted
            self._keep_best(trial, judged)
            self.current, self.error, self.damping = trial, error, damping
            self.iteration += 1
            self.done = not bool(gained.any()) and self.config.gradient != "reverse"
            yield self._report(event)

    def _begin(self) -> FitEvent:
        error = self._errors(self.current, self._runs)
        judged, event = self._judge(self.current, error)
        current, untrained = self.current, untrained_table(self.current.config)
        is_base = isinstance(current, TablePredictor) and torch.equal(current.plans.cpu(), untrained)
        base = self.judged.base_errors(judged if is_base else None)
        if not bool(error.isfinite().all() & judged.isfinite().all()):
            raise FloatingPointError(
                "The base solver's samples are not finite. Check the model's precision and its LoRAs, or fit a "
                "predictor for another sampler."
            )
        self.error, self.best, self.base = error, judged, base
        table = isinstance(self.current, TablePredictor)
        self.damping = torch.full_like(error, DAMPING if table else NETWORK_DAMPING)
        return self._report(event)

    def _report(self, event: FitEvent) -> FitEvent:
        self.history.append([event.error, event.held_out])
        return replace(event, iteration=self.iteration, model_calls=self.model_calls)

    def _judge(self, predictor: AnyPredictor, error: Tensor) -> tuple[Tensor, FitEvent]:
        """Its error on what is held out, and what there is to report."""
        last: list[tuple[Sequence[StepPlan], Sample, Sample]] = []

        def draw(goal: Goal) -> Sample:
            steps = self._run(goal, predictor)
            last[:] = [([step.plan for step in steps if step.plan is not None], steps[-1].x, goal.target)]
            return steps[-1].x

        judged = self._coupled(self.judged.errors(draw))
        plans, student, teacher = last[0]
        on_fitted, held_out = (float(values.square().mean().sqrt()) for values in (error, judged))
        means = tuple(plan.mean() for plan in plans)
        event = FitEvent(self.iteration, on_fitted, held_out, means, self.model_calls, student, teacher)
        return judged, event

    def _keep_best(self, trial: AnyPredictor, judged: Tensor) -> None:
        better = judged < self.best
        self.best = torch.where(better, judged, self.best)
        _take(self.predictor, trial, better)

    def _improved(self) -> tuple[AnyPredictor, Tensor, Tensor, Tensor]:
        """One iteration of Levenberg and Marquardt: a predictor, its error, where that is smaller, the damping then."""
        expansions = [self._expanded(goal) for goal in self.fitted]
        damping, best, error = self.damping.clone(), copy.deepcopy(self.current), self.error.clone()
        open_ = torch.ones_like(error, dtype=torch.bool)
        for _ in range(ATTEMPTS if isinstance(self.predictor, TablePredictor) else NETWORK_ATTEMPTS):
            trial = self._minimised(expansions, damping)
            runs: dict[int, list[Step]] = {}
            tried = self._errors(trial, runs)
            smaller = (tried < error) & open_
            _take(best, trial, smaller)
            error = torch.where(smaller, tried, error)
            self._runs |= {n: steps for n, steps in runs.items() if bool(smaller[self._group(n)])}
            damping = torch.where(smaller, damping * EASIER, torch.where(open_, damping * HARDER, damping))
            open_ &= ~smaller
            if not bool(open_.any()):
                break
        return best, error, ~open_, damping

    def _expanded(self, goal: Goal) -> Expansion:
        """Run once, and once more for every number from where it acts on."""
        steps = self._known_run(goal) or self._run(goal, self.current)
        end, plans = steps[-1].x, [step.plan for step in steps]
        planned = [(k, plan) for k, plan in enumerate(plans) if plan is not None]
        columns, numbers = [], []
        for k, plan in planned:
            for name, (low, high) in zip(COLUMNS, self.predictor.config.bounds, strict=True):
                if low == high:
                    continue
                value = torch.as_tensor(getattr(plan, name)).to(goal.x)
                step = torch.where(value + DIFFERENCE <= high, DIFFERENCE, -DIFFERENCE)
                varied = Decided((*plans[:k], plan.changed(name, value + step), *plans[k + 1 :]))
                same_mid = steps[k].mid if name == "scale_dir" else None
                resume = Resume(k, steps[k].start, steps[k - 1].history if k else (), same_mid)
                moved = ends(goal, self.grid, self.solver, varied, None, resume)[-1].x
                columns.append(((moved - end) / step).flatten(1))
                numbers.append(value.flatten().expand(len(end)))
        jacobian = torch.stack(columns, 1)
        residual = (end - goal.target).flatten(1)
        return Expansion(
            goal.group,
            (jacobian @ jacobian.mT).cpu().double(),
            (jacobian @ residual[..., None]).squeeze(-1).cpu().double(),
            torch.stack(numbers, 1).cpu().double(),
            [self._seen(steps[k].start).cpu() for k, _ in planned],
        )

    def _seen(self, start: Evaluation) -> Tensor:
        """What a network sees, sample by sample, even if it is the same for all."""
        seen = self.look(start)
        return seen.expand(len(start.x), *seen.shape[1:])

    def _minimised(self, expansions: Sequence[Expansion], damping: Tensor) -> AnyPredictor:
        """The predictor that does best by the expansions, not straying far where the damping is large."""
        trial = copy.deepcopy(self.current)
        if isinstance(trial, TablePredictor):
            groups = trial.plans.reshape(len(self.guidances), -1)
            free = self.free.to(groups.device)
            for group, (plans, damp) in enumerate(zip(groups, damping, strict=True)):
                normal, gradient = self._summed(expansions, group)
                moved = bounded_step(plans[free].cpu().double(), normal, gradient, float(damp), self.low, self.high)
                plans[free] = moved.to(plans)
            return trial
        assert isinstance(trial, AMEDPredictor)
        with torch.enable_grad():
            self._train(trial, expansions, float(damping))
        return trial

    def _summed(self, expansions: Sequence[Expansion], group: int) -> tuple[Tensor, Tensor]:
        count = int(self.free.sum())
        normal, gradient = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for e in expansions:
            if e.group == group:
                normal += e.normal.sum(0)
                gradient += e.gradient.sum(0)
        return self.workers.sum(normal), self.workers.sum(gradient)

    def _train(self, network: AMEDPredictor, expansions: Sequence[Expansion], damping: float) -> None:
        """Train a network on the expanded error, with no model call, for as long as others gain from it, too.

        Every fourth batch is not trained on. It tells when the network starts to learn its samples by heart,
        which with thousands of weights and hundreds of samples is soon.
        """
        watched = _joined(list(expansions)[3::4] or expansions)
        trained = _joined([e for n, e in enumerate(expansions) if n % 4 != 3])
        weights = list(network.requires_grad_(True).parameters())
        diagonal = torch.zeros(int(self.free.sum()), dtype=torch.float64)
        for e in trained:
            diagonal += e.normal.diagonal(dim1=1, dim2=2).sum(0)
        diagonal = self.workers.sum(diagonal) / sum(len(e.numbers) for e in trained) / self.workers.count
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        lowest, best = 0.0, copy.deepcopy(network.state_dict())
        for step in range(self.config.network_steps):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for e in trained:
                change = self._numbers(network, e) - e.numbers
                total = total + e.change_of_error(change) + damping * (diagonal * change.square()).sum()
            total.backward(inputs=weights)  # type: ignore[no-untyped-call]
            for weight in weights:
                assert weight.grad is not None
                self.workers.sum(weight.grad)
            optimizer.step()
            if step % 5 == 4:
                with torch.no_grad():
                    changes = [e.change_of_error(self._numbers(network, e) - e.numbers) for e in watched]
                    value = float(self.workers.sum(torch.stack(changes).sum()))
                if value < lowest:
                    lowest, best = value, copy.deepcopy(network.state_dict())
        network.load_state_dict(best)
        network.requires_grad_(False)

    def _numbers(self, network: AMEDPredictor, expansion: Expansion) -> Tensor:
        """The free numbers (batch, numbers) of a network's plans for what it saw."""
        own = network.planner(guidance=self.guidances[expansion.group]).own
        made = []
        for interval, seen in enumerate(expansion.seen):
            plan = own(interval, seen)
            for name, (low, high) in zip(COLUMNS, self.predictor.config.bounds, strict=True):
                if low < high:
                    value = torch.as_tensor(getattr(plan, name))
                    made.append(value.cpu().double().flatten().expand(len(expansion.numbers)))
        return torch.stack(made, 1)

    def _descended(self) -> tuple[AnyPredictor, Tensor]:
        """One pass of Adam along the gradient of autograd through the whole trajectory, call by call recomputed."""
        trial = copy.deepcopy(self.current).requires_grad_(True)
        weights = list(trial.parameters())
        optimizer = torch.optim.Adam(weights, lr=self.config.learning_rate)
        if self.optimizer is not None:
            optimizer.load_state_dict(self.optimizer)
        for goal in self.fitted:
            optimizer.zero_grad()
            ask = goal.denoiser

            def again(x: Sample, sigma: Sigma, ask: Any = ask) -> Any:
                return checkpoint(ask, x, sigma, use_reentrant=False)

            end = self._run(replace(goal, denoiser=again), trial)[-1].x
            (end - goal.target).square().mean().backward(inputs=weights)  # type: ignore[no-untyped-call]
            for weight in weights:
                if weight.grad is not None:
                    self.workers.sum(weight.grad)
            optimizer.step()
            if isinstance(trial, TablePredictor):
                low, high = (torch.tensor(bound) for bound in zip(*self.predictor.config.bounds, strict=True))
                trial.plans.data.clamp_(low.to(trial.plans), high.to(trial.plans))
        trial.requires_grad_(False)
        with torch.no_grad():
            error = self._errors(trial, {})
        self.optimizer = copy.deepcopy(optimizer.state_dict())
        return trial, error

    def _run(self, goal: Goal, predictor: AnyPredictor) -> list[Step]:
        planner = predictor.planner(look=self.look, guidance=self.guidances[goal.group])
        return ends(goal, self.grid, self.solver, planner, predictor.config.first)

    def _known_run(self, goal: Goal) -> list[Step]:
        """The current predictor's run toward this goal, if it is at hand from measuring its error."""
        return moved_to(self._runs.pop(goal.number, []), goal.x.device)

    def _errors(self, predictor: AnyPredictor, runs: dict[int, list[Step]]) -> Tensor:
        """The errors on what is fitted; `runs` keeps the runs that showed them, as many as memory allows."""
        kept = 0

        def draw(goal: Goal) -> Sample:
            nonlocal kept
            steps = self._run(goal, predictor)
            kept += 2 * len(steps) * 3 * goal.x.numel() * goal.x.element_size()
            if self.config.gradient != "reverse" and kept <= self.config.keep_bytes:
                runs[goal.number] = moved_to(steps, "cpu")
            return steps[-1].x

        return self._coupled(self.fitted.errors(draw))

    def _group(self, number: int) -> int:
        """Where a batch's error lies among the errors."""
        return self.fitted.batches()[number][0] if isinstance(self.predictor, TablePredictor) else 0

    def _coupled(self, errors: Tensor) -> Tensor:
        """A table's plans at one guidance scale are its own; a network's weights serve all of them."""
        table = isinstance(self.predictor, TablePredictor)
        return errors if table else errors.square().mean(0, keepdim=True).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """All that continues this fit exactly; `files.save_state` writes it. An iteration begun is begun again."""
        return {
            "config": asdict(self.config),
            "predictor_config": asdict(self.predictor.config),
            "predictor": _weights(self.predictor),
            "current": _weights(self.current),
            "iteration": self.iteration,
            "numbers": {"damping": self.damping, "error": self.error, "best": self.best, "base": self.base},
            "done": self.done,
            "history": [list(errors) for errors in self.history],
            "optimizer": self.optimizer,
            "model_calls": self.model_calls,
            "goals": [self.fitted.state_dict(), self.judged.state_dict()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it belongs to a fit with other settings."""
        refuse_other_settings(state, {"config": self.config, "predictor_config": self.predictor.config})
        self.predictor.load_state_dict(state["predictor"])
        self.current.load_state_dict(state["current"])
        self.iteration, self.done = state["iteration"], state["done"]
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self.history = [list(errors) for errors in state["history"]]
        self.optimizer = state["optimizer"]
        self._earlier_calls = state["model_calls"]
        for goals, saved in zip((self.fitted, self.judged), state["goals"], strict=True):
            goals.load_state_dict(saved)

    def summary(self) -> dict[str, Any]:
        """How this predictor came about, for the header of its file; errors are of what is held out."""
        best, base = (float(v.square().mean().sqrt()) for v in (self.best, self.base))
        return {
            **asdict(self.config),
            "objective": "end to end",
            "teacher": f"converged, {self.config.teacher_calls} calls",
            "iterations": self.iteration,
            "model_calls": self.model_calls * self.workers.count,
            "model_calls_on_paper": self.floor * self.workers.count,
            "error": best,
            "base_solver_error": base,
            "gain": 1 - best / base,
        }


def bounded_step(start: Tensor, normal: Tensor, gradient: Tensor, damping: float, low: Tensor, high: Tensor) -> Tensor:
    """The damped Gauss-Newton step from `start` (numbers,), kept inside [low, high].

    A number that would leave its range is put at its end, and the others then make the best of it.
    """
    floor = 1e-12 * normal.diagonal().max() + torch.finfo(normal.dtype).tiny
    damped = normal + (damping * normal.diagonal() + floor).diag()
    moved, held = start.clone(), torch.zeros_like(start, dtype=torch.bool)
    for _ in range(len(start)):
        free = ~held
        change = moved - start
        right = -gradient[free] - damped[free][:, held] @ change[held]
        moved[free] = start[free] + torch.linalg.solve(damped[free][:, free], right)
        out = free & ((moved < low) | (moved > high))
        moved = moved.clamp(low, high)
        held |= out
        if not bool(out.any()) or bool(held.all()):
            break
    return moved


def _joined(expansions: Sequence[Expansion]) -> list[Expansion]:
    """The same in one piece per group, which trains faster."""
    pieces = []
    for group in sorted({e.group for e in expansions}):
        own = [e for e in expansions if e.group == group]
        parts = [torch.cat(values) for values in zip(*((e.normal, e.gradient, e.numbers) for e in own), strict=True)]
        seen = [torch.cat(values) for values in zip(*(e.seen for e in own), strict=True)]
        pieces.append(Expansion(group, parts[0], parts[1], parts[2], seen))
    return pieces


def _take(into: AnyPredictor, other: AnyPredictor, where: Tensor) -> None:
    """Take over another predictor, or of a table the guidance scales `where` it is better."""
    if isinstance(into, TablePredictor) and isinstance(other, TablePredictor):
        mask = where.to(into.plans.device).reshape(-1, *[1] * (into.plans.ndim - 1)) if into.config.guidances else where
        into.plans.copy_(torch.where(mask.to(into.plans.device), other.plans, into.plans))
    elif bool(where.all()):
        into.load_state_dict(other.state_dict())


def _weights(predictor: AnyPredictor) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in predictor.state_dict().items()}
