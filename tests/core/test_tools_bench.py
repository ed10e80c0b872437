"""Every method at equal true model calls."""

from typing import Any

import pytest
from problems import Counting, Mixture, mixture
from torch import Tensor

from amed_core.fit.teacher import heun_calls
from amed_core.samplers import NAMES
from amed_core.tools.bench import (
    TEACHER_NAME,
    BenchSettings,
    Row,
    as_json,
    bench,
    best_of_each,
    chosen,
    config_named,
    students,
    table,
    total_calls,
)

SMALL = BenchSettings(calls=(3,), samples=6, batch=4, teacher_calls=20, methods=("euler poly*", "heun log*"))


class Counted(Mixture):
    """Counts the samples it answers for."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting(mixture)

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        return self.counting(x, sigma)


def row(method: str, calls: int, error: float | None, fit_calls: int | None = None) -> Row:
    return Row(method, calls, error, error, error, error, error, None, 0.0, fit_calls, None)


def test_every_row_took_the_calls_that_it_says() -> None:
    model = Counted()
    rows, before = [], 0
    for one in bench(model, SMALL):
        rows.append(one)
        assert model.counting.samples - before == one.calls * SMALL.samples
        before = model.counting.samples
    assert rows[0].method == TEACHER_NAME
    assert rows[0].calls == heun_calls(SMALL.teacher_calls)
    assert {one.method.split()[0] for one in rows[1:]} == {"euler", "heun"}
    heard = SMALL.samples * (SMALL.teacher_calls + 3 * (len(rows) - 1))
    assert total_calls(model, SMALL) == heard


def test_errors_are_to_the_teacher_and_a_solver_that_blows_up_has_none() -> None:
    class Breaking(Mixture):
        def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            denoised, features = super().__call__(x, sigma)
            return denoised * (float("nan") if abs(float(sigma) - 0.2) < 0.15 else 1.0), features

    settings = BenchSettings(calls=(3,), samples=4, teacher_calls=2, methods=("euler *",))
    rows = list(bench(Breaking(), settings))
    assert any(one.error is None for one in rows)
    assert "-" in table(rows)


def test_a_table_has_the_best_first_and_marks_the_best_that_learned_nothing() -> None:
    rows = [row("teacher", 9, 0.0), row("a poly", 3, 0.3), row("a log", 3, 0.2), row("ours", 3, 0.1, 50)]
    lines = table(rows).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["ours", "a", "a"]
    assert sum("*" in line for line in lines) == 1
    assert "a log *" in lines[3]
    assert [one.method for one in best_of_each(rows)] == ["teacher", "a log", "ours"]
    assert [one["error"] for one in as_json(rows)] == [0.0, 0.3, 0.2, 0.1]


def test_methods_are_chosen_by_shell_patterns_and_none_is_an_error() -> None:
    assert chosen(["amed", "amed table", "euler"], ["amed*"]) == ["amed", "amed table"]
    with pytest.raises(ValueError, match="No method fits magic"):
        list(bench(Mixture(), BenchSettings(methods=("magic",))))


@pytest.mark.parametrize("name", students())
def test_every_learned_method_has_settings_of_its_name(name: str) -> None:
    config = config_named(name, 4, Mixture())
    assert config.calls == 4
    assert config.kind == ("table" if name.endswith("table") else "multistep" if "multistep" in name else "network")
    assert (config.sigmas[-1] == 0) != name.endswith("published")


def test_every_sampler_type_is_benched() -> None:
    assert set(NAMES) <= set(students())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 1}, "at least 2 samples"),
        ({"calls": (1,)}, "start at 2"),
        ({"calls": ()}, "start at 2"),
        ({"batch": 0}, "batch of at least 1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be_benched_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BenchSettings(**settings)
