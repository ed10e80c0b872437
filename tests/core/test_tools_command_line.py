"""`python -m amed_core` on a denoiser of one's own."""

import json
from pathlib import Path

import pytest
from PIL import Image

from amed_core.files import load_predictor, read_notes
from amed_core.fit.make import students
from amed_core.tools.command_line import main

MIXTURE = '''
import torch

class Mixture:
    """Two isotropic Gaussians, at +1 and -1."""
    shape, sigma_min, sigma_max = (1, 4, 4), 0.002, 80.0

    def __init__(self, cfg=1.0):
        self.cfg = cfg

    def __call__(self, x, sigma):
        v = 0.04 + sigma**2
        posterior = torch.tanh(x.mean((1, 2, 3), keepdim=True) * 16 / v)
        return (0.04 * x + sigma**2 * posterior) / v, posterior.expand(-1, 2, 4, 4)

    def data(self, n):
        return torch.randn(n, 1, 4, 4) * 0.2 + torch.arange(n).remainder(2).mul(2).sub(1).view(-1, 1, 1, 1)

class Plain:
    shape, sigma_min, sigma_max = (3,), 0.03, 14.6

    @torch.no_grad()
    def __call__(self, x, sigma):
        assert sigma.ndim in (0, x.ndim), "sigma is a scalar or (batch, 1, ..., 1)"
        return x / (1 + sigma**2)

class NoShape:
    sigma_min, sigma_max = 0.03, 14.6

    def __call__(self, x, sigma):
        return x

class Broken(Plain):
    def __call__(self, x, sigma):
        return x * float("nan")
'''
KEYS = ["method", "calls", "error", "error_low", "error_high", "error_median", "error_p90"]
KEYS += ["frechet", "seconds", "fit_calls", "fit_seconds"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MIXTURE)
    return tmp_path


def bench(place: Path, name: str, *options: str) -> list[dict[str, object]]:
    out = place / "rows.json"
    common = ["--samples", "40", "--teacher-calls", "60", "--json", str(out)]
    assert main(["bench", "--denoiser", f"{place / 'mine.py'}:{name}", *common, *options]) == 0
    rows: list[dict[str, object]] = json.loads(out.read_text())
    return rows


def test_bench_has_a_row_for_every_method_at_every_number_of_calls(place: Path) -> None:
    rows = bench(place, "Mixture", "--calls", "3", "4")
    assert all(list(row) == KEYS for row in rows)
    for calls in (3, 4):
        methods = [row["method"] for row in rows if row["calls"] == calls]
        assert len(methods) == len(set(methods))
        assert set(students()) <= set(methods)
        for solver in ("euler", "ipndm-4", "dpmpp-3", "dpmpp-3 noise", "heun", "dpm_2"):
            for schedule in ("polynomial", "logsnr", "time_uniform"):
                assert any(str(m).startswith(f"{solver} {schedule}") for m in methods)
    for row in rows:
        learned = row["method"] in students()
        assert (row["fit_calls"] is not None) == (row["fit_seconds"] is not None) == learned
        if row["error"] is not None:
            assert row["error_low"] <= row["error"] <= row["error_high"]  # type: ignore[operator]
            assert row["frechet"] is not None
    assert [row["error"] for row in rows if row["method"] == "teacher"] == [0]


def test_without_data_there_is_no_frechet_distance_and_without_autograd_there_is_a_fit(place: Path) -> None:
    rows = bench(place, "Plain", "--calls", "3", "--methods", "amed", "euler discrete*")
    assert [row["method"] for row in rows][:2] == ["teacher", "euler discrete"]
    assert all(row["frechet"] is None for row in rows)
    assert rows[-1]["method"] == "amed"
    assert rows[-1]["fit_calls"] > 0  # type: ignore[operator]


def test_the_same_seed_gives_the_same_rows(place: Path) -> None:
    def timeless() -> list[dict[str, object]]:
        rows = bench(place, "Mixture", "--calls", "3", "--methods", "amed", "euler poly*")
        return [{k: v for k, v in row.items() if "seconds" not in k and k != "frechet"} for row in rows]

    assert timeless() == timeless()


@pytest.mark.parametrize(
    "student", [[], ["--solver", "amed_multistep"], ["--solver", "amed_euler", "--table", "--schedule", "searched"]]
)
def test_train_inspect_sample_and_resume(place: Path, student: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = ["--denoiser", f"{place / 'mine.py'}:Mixture"]
    file, state, again = place / "p.safetensors", place / "state.safetensors", place / "again.safetensors"
    train = ["train", *denoiser, "--trajectories", "64", "--calls", "4", "--batch-size", "16", "--cfg", "2.0"]
    train += student
    assert main([*train, "--output", str(file), "--state", str(state)]) == 0
    assert load_predictor(file).config.calls == 4
    assert load_predictor(file).config.guidance == 2.0
    training = read_notes(file)["training"]
    assert training["trajectories"] == 64
    if student:  # fitted end to end, which measures
        assert training["error"] < training["base_solver_error"]
    assert main([*train, "--output", str(again), "--resume", str(state)]) == 0
    old, new = load_predictor(file).state_dict(), load_predictor(again).state_dict()
    assert all((old[k] == new[k]).all() for k in old), "a finished training has nothing left to do"
    assert main(["inspect", str(file)]) == 0
    assert '"Mixture"' in capsys.readouterr().out
    assert (
        main(["sample", *denoiser, "--predictor", str(file), "--samples", "5", "--output", str(place / "s.png")]) == 0
    )
    assert Image.open(place / "s.png").size == (3 * 96, 2 * 96)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--denoiser", "nothing"], "FILE.py:NAME"),
        (["bench", "--denoiser", "gone.py:Mixture"], "no file gone.py"),
        (["bench", "--denoiser", "{mine}:Missing"], "It defines: Broken, Mixture, NoShape, Plain"),
        (["bench", "--denoiser", "{mine}:NoShape"], "lacks shape"),
        (["bench", "--denoiser", "{mine}:Plain", "--cfg", "2"], "takes no cfg"),
        (["bench", "--denoiser", "{mine}:Mixture", "--calls", "1"], "start at 2"),
        (["bench", "--denoiser", "{mine}:Mixture", "--samples", "1"], "at least 2 samples"),
        (["bench", "--denoiser", "{mine}:Mixture", "--methods", "magic"], "No method fits magic"),
        (["train", "--denoiser", "{mine}:Mixture", "--calls", "1"], "at least 2"),
        (["train", "--denoiser", "{mine}:Broken", "--trajectories", "8"], "interval 1"),
        (["inspect", "gone.safetensors"], "no file gone.safetensors"),
        (["inspect", "{mine}"], "is damaged"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_wrong(
    place: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(mine=place / "mine.py") for a in arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("amed_core: ")]
    assert len(said) == 1
    assert words in said[0]


def test_a_predictor_of_another_model_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, mine = str(place / "p.safetensors"), f"{place / 'mine.py'}"
    assert main(["train", "--denoiser", f"{mine}:Mixture", "--trajectories", "8", "--output", file]) == 0
    assert main(["sample", "--denoiser", f"{mine}:Plain", "--predictor", file]) == 2
    assert "made for another model: family 'Mixture'" in capsys.readouterr().err
