"""Learning from the first pictures: what it costs, what it keeps, and that it is better than not learning."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory import Peak
from problems import SIGMA_MAX, Counting, Mixture, Smooth
from torch import Tensor

from amed_core import Method, NoMidpoint, digits, sample, spectrum
from amed_core.digits import DigitsDenoiser
from amed_core.files import load_state, save_state
from amed_core.fit import closed_form, teacher
from amed_core.fit.closed_form import NormalEquations, robust_weights
from amed_core.fit.huber import squares
from amed_core.fit.learner import MOST_APART, Learner
from amed_core.fit.teacher import heun_samples
from amed_core.fit.trajectories import noise
from amed_core.samplers import ModelFacts, student_config
from amed_core.solvers import CautiousIpndm, Ipndm

FACTS = ModelFacts(0.002, SIGMA_MAX)
SHAPE = (2, 6)


def noisy(row: int, count: int = 1) -> Tensor:
    return SIGMA_MAX * noise(range(row, row + count), SHAPE, 3)


def learner(calls: int = 5, levels: tuple[float, ...] = (), **changes: float) -> Learner:
    config = student_config("amed_multistep", calls, FACTS)
    if levels:
        config = replace(config, sigmas=(levels[0], *config.sigmas[1:]) if levels[0] > config.sigmas[1] else levels)
    return Learner(config, levels, **changes)


def taught(made: Learner, model: Mixture, rows: range) -> Learner:
    for row in rows:
        x = noisy(row)
        made.learn(model, x, made.taught(model, x))
    return made


def weights(made: Learner) -> list[Tensor]:
    return [part for one in made.candidates for part in (one.table.weights, one.table.first)]


def test_the_first_picture_is_the_teachers() -> None:
    made, x, model = learner(), noisy(0), Mixture()
    method = Method(made.teacher_levels, CautiousIpndm(3), NoMidpoint())
    assert torch.equal(made.taught(model, x).end, sample(model, x, method))


@pytest.mark.parametrize(("calls", "slow"), [(5, 24), (8, 24), (9, 27), (16, 48)])
def test_a_teacher_takes_three_times_the_students_calls_at_least(calls: int, slow: int) -> None:
    asked = Counting(Mixture())
    learner(calls).taught(asked, noisy(0))
    assert asked.calls == slow


@pytest.mark.parametrize(("calls", "first", "next_ones"), [(5, 150, 80), (8, 250, 130)])
def test_a_picture_costs_no_more_than_it_says(calls: int, first: int, next_ones: int) -> None:
    made = learner(calls)
    for row, most in enumerate((first, next_ones, next_ones)):
        asked, x = Counting(Mixture()), noisy(row)
        expected = made.calls_for(1)
        path = made.taught(asked, x)
        assert asked.calls == 24
        made.learn(asked, x, path)
        assert asked.calls <= 24 + expected
        assert asked.calls <= most


def test_learning_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, at_once, again = Mixture(), taught(learner(), Mixture(), range(3)), learner()
    for row in range(3):
        taught(again, model, range(row, row + 1))
        save_state(tmp_path / "learned.safetensors", again.state_dict())
        again = learner()
        again.load_state_dict(load_state(tmp_path / "learned.safetensors"))
    assert again.chosen.name == at_once.chosen.name
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(at_once), strict=True))
    assert again.held_out_ratio == at_once.held_out_ratio


def test_stopped_inside_a_picture_it_has_learned_nothing_of_it() -> None:
    made = taught(learner(), Mixture(), range(1))
    before = [part.clone() for part in weights(made)]
    x = noisy(1)
    path = made.taught(Mixture(), x)

    class Stops(Mixture):
        left = 7

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__call__(x, sigma)

    with pytest.raises(KeyboardInterrupt):
        made.learn(Stops(), x, path)
    assert made.pictures == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True))


def test_a_state_of_another_situation_is_refused() -> None:
    state = taught(learner(), Mixture(), range(1)).state_dict()
    with pytest.raises(ValueError, match="another situation"):
        learner(6).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot be used"):
        learner().load_state_dict({"candidates": 3})


def test_a_damaged_state_is_refused_whole() -> None:
    state, made = taught(learner(), Mixture(), range(1)).state_dict(), learner()
    learned = state["candidates"][0]["learned"]
    learned["weights"] = learned["weights"][0]  # would fit by broadcasting
    with pytest.raises(ValueError, match="cannot be used"):
        made.load_state_dict(state)
    assert not made.candidates


def test_a_list_of_levels_is_kept_and_may_end_above_0() -> None:
    for levels in ((80.0, 20.0, 5.0, 1.0, 0.2, 0.0), (80.0, 20.0, 5.0, 1.0)):
        made = taught(learner(len(levels) - 1, levels), Mixture(), range(1))
        assert all(one.table.config.sigmas == levels for one in made.candidates)
        assert made.taught(Mixture(), noisy(9)).levels[-1] == levels[-1]


def test_after_a_few_pictures_it_is_nearer_to_the_truth_than_plain_solvers() -> None:
    model, x = Mixture(), noisy(1000, 64)
    goal = heun_samples(model, x, 0.002, SIGMA_MAX, 100)
    made = taught(learner(), model, range(4))
    plain = [one for one in made.candidates if one.plain]

    def error(method: Method) -> float:
        return float((sample(model, x, method) - goal).square().mean().sqrt())

    assert error(made.chosen.table.method()) < min(error(one.table.method()) for one in plain)


def test_from_pure_noise_the_first_call_may_ask_where_the_model_has_something_to_say() -> None:
    """A step without a call leads there, with gains that the pictures showed; elsewhere there is no such candidate."""
    model, made = Smooth(3.0), learner(3)
    for row in range(3):
        x = SIGMA_MAX * noise(range(row, row + 1), (1, 16, 16), 3)
        made.learn(model, x, made.taught(model, x))
    late = min((one for one in made.candidates if one.grid.first), key=lambda one: one.score)
    assert 0 < late.grid.first < SIGMA_MAX
    asked, x = Counting(model), SIGMA_MAX * noise(range(50, 60), (1, 16, 16), 3)
    end, goal = sample(asked, x, late.table.method()), heun_samples(model, x, 0.002, SIGMA_MAX)
    assert asked.calls == 3
    plain = [float(squares(sample(model, x, o.table.method()), goal).mean()) for o in made.candidates if o.plain]
    assert float(squares(end, goal).mean()) < 0.3 * min(plain)
    later = learner(4, (40.0, 10.0, 2.0, 0.5, 0.0))
    later.learn(model, x[:1] / 2, later.taught(model, x[:1] / 2))
    assert not any(one.grid.first for one in later.candidates)


def test_with_the_users_levels_its_first_call_asks_between_the_first_two() -> None:
    listed, model = (SIGMA_MAX, 10.0, 2.0, 0.5, 0.0), Smooth(3.0)
    made, x = learner(4, listed), SIGMA_MAX * noise(range(1), (1, 16, 16), 3)
    made.learn(model, x, made.taught(model, x))
    firsts = [one.grid.first for one in made.candidates if one.grid.first]
    assert firsts
    assert all(listed[1] < level < listed[0] for level in firsts)
    assert all(one.grid.levels == listed for one in made.candidates)
    assert any(one.lessons is not None and not one.grid.first for one in made.candidates), "and the list as it is"


def test_a_teacher_that_errs_like_its_student_takes_more_calls_from_then_on(tmp_path: Path) -> None:
    """This mixture is learned nearly to the teacher's own error, which its path shows; and a file remembers it."""
    made = taught(learner(8), Mixture(), range(3))
    assert made.teacher_calls == 48
    asked = Counting(Mixture())
    made.taught(asked, noisy(3))
    assert asked.calls == 48
    again = learner(8)
    again.load_state_dict(made.state_dict())
    assert (again.teacher_calls, again.teacher_errors) == (48, [])
    taught(made, Mixture(), range(3, 4))
    assert made.teacher_calls == 48, "one picture says little of the new teacher"
    assert len(made.teacher_errors) == 1


def test_many_steps_do_not_try_everything() -> None:
    made, asked = learner(40), Counting(Mixture())
    made.learn(asked, noisy(0), made.taught(Mixture(), noisy(0)))
    assert asked.calls <= 520


def test_of_both_kinds_of_beginning_two_go_on() -> None:
    made, model = learner(4), Smooth(3.0)
    x = SIGMA_MAX * noise(range(1), (1, 16, 16), 3)
    made.learn(model, x, made.taught(model, x))
    kinds = [bool(one.grid.first) for one in made.candidates if not one.plain]
    assert len(kinds) == 5
    assert min(kinds.count(True), kinds.count(False)) >= 2


def test_it_stops_after_eight_pictures_at_the_latest() -> None:
    made = learner(3)
    for row in range(8):
        assert not made.done or made.good_in_a_row >= 2
        taught(made, Mixture(), range(row, row + 1))
    assert made.done


def test_one_odd_trajectory_does_not_rule_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 6, 1, 50, generator=generator)
    aim = 0.7 * vectors[0] + 0.3 * vectors[1] + 0.01 * torch.randn(6, 1, 50, generator=generator)
    aim[5] = -20 * vectors[0, 5]
    equations = NormalEquations.of(list(vectors), aim, spectral=False)
    found, _ = robust_weights([equations], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert (found - torch.tensor([0.7, 0.3])).abs().max() < 0.1


def test_a_cautious_teacher_has_the_order_that_its_slopes_allow() -> None:
    """On a smooth ODE the error falls as iPNDM's of order 3; where slopes jump about, it is Euler."""
    model, x = Mixture(), noisy(0, 8)
    goal = heun_samples(model, x, 0.002, SIGMA_MAX, 200)
    grid = learner().teacher_levels
    errors = [
        float((sample(model, x, Method(grid, solver, NoMidpoint())) - goal).square().mean())
        for solver in (CautiousIpndm(3), Ipndm(1))
    ]
    assert errors[0] < errors[1] / 4


def test_a_path_in_half_precision_teaches_the_same() -> None:
    model, facts = DigitsDenoiser(3.0), ModelFacts(digits.SIGMA_MIN, digits.SIGMA_MAX)
    x = digits.SIGMA_MAX * noise(range(24), digits.SHAPE, 3).float()
    drawn, chosen = [], []
    for half in (False, True):
        made = Learner(student_config("amed_multistep", 5, facts))
        for rows in (range(4), range(4, 8)):
            asked = model.for_rows(rows)
            made.learn(asked, x[rows], made.taught(asked, x[rows], half=half))
        chosen.append(made.chosen)
        drawn.append(sample(model.for_rows(range(8, 24)), x[8:], made.chosen.table.method()))
    assert chosen[0].name == chosen[1].name
    torch.testing.assert_close(chosen[1].table.weights, chosen[0].table.weights, rtol=0, atol=0.02)
    converged = heun_samples(model.for_rows(range(8, 24)), x[8:], digits.SIGMA_MIN, digits.SIGMA_MAX, 60)
    assert squares(*drawn).mean() < 1e-3 * squares(drawn[0], converged).mean()


def test_the_first_choice_takes_little_memory_beside_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (teacher, closed_form):
        monkeypatch.setattr(module, "PIECE", 1 << 10)
    x = SIGMA_MAX * noise(range(2), (4, 32, 64), 3).float()
    made = learner(5, (SIGMA_MAX, 20.0, 5.0, 1.0, 0.1, 0.0))
    path = made.taught(Mixture(), x, half=True)
    with Peak() as peak:
        made._proposed(path)
    assert peak.most < 0.25 * (path.x.nbytes + path.slopes.nbytes)


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_lesson_holds_what_one_candidate_evaluated_and_no_more(
    pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (teacher, closed_form):
        monkeypatch.setattr(module, "PIECE", 1 << 10)
    for module in (spectrum, closed_form):
        monkeypatch.setattr(module, "AT_ONCE", 1 << 10)
    made, x = learner(), SIGMA_MAX * noise(range(1), (1, 256, 256), 0)

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma**2)

    paths = [made.taught(gaussian, x) for _ in range(pictures)]
    for path in paths[:-1]:
        made.learn(gaussian, x, path)
    with Peak() as peak:
        made.learn(gaussian, x, paths[-1])
    sample_bytes = x.numel() * x.element_size()
    assert peak.most < 8 * made.config.calls * sample_bytes, "of each call the sample, the answer, and sums of them"


def of_pictures(*, guided: bool = True, first_steps: bool = True) -> Learner:
    """A learner of guided pictures with frequencies."""
    facts = replace(FACTS, guided=guided)
    return Learner(student_config("amed_multistep", 4, facts, guidance=3.0), first_steps=first_steps)


def taught_smooth(made: Learner, pictures: int) -> Learner:
    for row in range(pictures):
        x = SIGMA_MAX * noise(range(row, row + 1), (1, 16, 16), 3)
        made.learn(Smooth(3.0), x, made.taught(Smooth(3.0), x))
    return made


def error(made: Learner) -> float:
    x = SIGMA_MAX * noise(range(1000, 1032), (1, 16, 16), 3)
    goal = heun_samples(Smooth(3.0), x, 0.002, SIGMA_MAX, 200)
    return float((sample(Smooth(3.0), x, made.chosen.table.method()) - goal).square().mean().sqrt())


def test_what_guidance_adds_and_bands_are_learned_too_and_bring_it_nearer() -> None:
    both, unguided, neither = (
        taught_smooth(of_pictures(guided=guided, first_steps=first), 3)
        for guided, first in ((True, True), (False, True), (False, False))
    )
    config = both.chosen.table.config
    assert (config.guided, config.spectral) == (True, True)
    assert float(both.chosen.table.guided.abs().max()) > 0.01
    assert error(both) < error(unguided) < error(neither)


def test_a_learner_of_guided_pictures_goes_on_from_a_file(tmp_path: Path) -> None:
    at_once, again = taught_smooth(of_pictures(), 2), taught_smooth(of_pictures(), 1)
    save_state(tmp_path / "learned.safetensors", again.state_dict())
    again = of_pictures()
    again.load_state_dict(load_state(tmp_path / "learned.safetensors"))
    x = SIGMA_MAX * noise(range(1, 2), (1, 16, 16), 3)
    again.learn(Smooth(3.0), x, again.taught(Smooth(3.0), x))
    for one, other in zip(again.candidates, at_once.candidates, strict=True):
        assert one.name == other.name
        for ours, theirs in zip(one.table.parameters(), other.table.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_many_calls_leave_bands_and_guidance_alone() -> None:
    config = student_config("amed_multistep", MOST_APART + 1, replace(FACTS, guided=True), guidance=3.0)
    made, x = Learner(config), SIGMA_MAX * noise(range(1), (1, 16, 16), 3)
    assert made.calls_for(1) == Learner(replace(config, guided=False)).calls_for(1), "no call shows what guidance adds"
    made.learn(Smooth(3.0), x, made.taught(Smooth(3.0), x))
    assert not any(one.table.config.guided or one.table.config.spectral for one in made.candidates)
