"""`python -m amed_core` on a denoiser of one's own."""

import json
from pathlib import Path

import pytest
from PIL import Image
from problems import Mixture, same
from torch import Tensor

from amed_core.files import load_predictor, read_notes
from amed_core.tools.bench import students
from amed_core.tools.command_line import main

MINE = Path(__file__).with_name("denoisers.py")
KEYS = ["method", "calls", "error", "error_low", "error_high", "error_median", "error_p90"]
KEYS += ["frechet", "seconds", "fit_calls", "fit_seconds"]


def bench(folder: Path, name: str, *options: str) -> list[dict[str, object]]:
    out = folder / "rows.json"
    common = ["--samples", "40", "--teacher-calls", "60", "--json", str(out)]
    assert main(["bench", "--denoiser", f"{MINE}:{name}", *common, *options]) == 0
    rows: list[dict[str, object]] = json.loads(out.read_text())
    return rows


def test_bench_has_a_row_for_every_method_at_every_number_of_calls(tmp_path: Path) -> None:
    rows = bench(tmp_path, "Mixture", "--calls", "3", "4")
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


def test_without_data_there_is_no_frechet_distance_and_without_autograd_there_is_a_fit(tmp_path: Path) -> None:
    rows = bench(tmp_path, "Plain", "--calls", "3", "--methods", "amed", "euler discrete*")
    assert [row["method"] for row in rows][:2] == ["teacher", "euler discrete"]
    assert all(row["frechet"] is None for row in rows)
    assert rows[-1]["method"] == "amed"
    assert rows[-1]["fit_calls"] > 0  # type: ignore[operator]


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    def timeless() -> list[dict[str, object]]:
        rows = bench(tmp_path, "Mixture", "--calls", "3", "--methods", "amed", "euler poly*")
        return [{k: v for k, v in row.items() if "seconds" not in k and k != "frechet"} for row in rows]

    assert timeless() == timeless()


@pytest.mark.parametrize(
    "student", [[], ["--solver", "amed_multistep"], ["--solver", "amed_euler", "--table", "--schedule", "searched"]]
)
def test_train_inspect_sample_and_resume(
    tmp_path: Path, student: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    denoiser = ["--denoiser", f"{MINE}:Mixture"]
    file, state, again = tmp_path / "p.safetensors", tmp_path / "state.safetensors", tmp_path / "again.safetensors"
    train = ["train", *denoiser, "--trajectories", "64", "--calls", "4", "--batch-size", "16", "--cfg", "2.0"]
    train += student
    assert main([*train, "--output", str(file), "--state", str(state)]) == 0
    assert load_predictor(file).config.calls == 4
    assert load_predictor(file).config.guidance == 2.0
    training = read_notes(file)["training"]
    assert training["trajectories"] == 64
    if student:  # fitted end to end, which measures
        assert training["error"] < training["baseline_error"]
    assert main([*train, "--output", str(again), "--resume", str(state)]) == 0
    old, new = load_predictor(file).state_dict(), load_predictor(again).state_dict()
    assert all((old[k] == new[k]).all() for k in old), "a finished training has nothing left to do"
    assert main(["inspect", str(file)]) == 0
    assert '"Mixture"' in capsys.readouterr().out
    assert (
        main(["sample", *denoiser, "--predictor", str(file), "--samples", "5", "--output", str(tmp_path / "s.png")])
        == 0
    )
    assert Image.open(tmp_path / "s.png").size == (3 * 96, 2 * 96)


def test_train_for_a_number_of_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, state = tmp_path / "p.safetensors", tmp_path / "state.safetensors"
    train = ["train", "--solver", "amed_multistep", "--cfg", "3", "--passes", "4", "--effort", "quick"]
    train += ["--trajectories", "2", "--batch-size", "2", "--output", str(file)]
    assert main([*train, "--state", str(state)]) == 0
    config = load_predictor(file).config
    assert config.passes <= 4
    said = capsys.readouterr().out
    assert f"{config.calls} model calls, which are {config.passes} passes of the network" in said
    assert "ask the negative" in said
    assert main([*train, "--resume", str(state)]) == 0
    assert load_predictor(file).config == config
    assert main(["inspect", str(file)]) == 0
    assert f"passes of the network: {config.passes}" in capsys.readouterr().out


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
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(mine=MINE) for a in arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("amed_core: ")]
    assert len(said) == 1
    assert words in said[0]


def test_a_predictor_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, mine = str(tmp_path / "p.safetensors"), str(MINE)
    assert main(["train", "--denoiser", f"{mine}:Mixture", "--trajectories", "8", "--output", file]) == 0
    assert main(["sample", "--denoiser", f"{mine}:Plain", "--predictor", file]) == 2
    assert "made for another model: family 'Mixture'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--solver", "amed_multistep", "--table"], "leave out --table"),
        (["--solver", "amed_multistep", "--rho", "3"], "leave out --rho"),
        (["--table", "--published"], "not the paper's"),
        (["--cfg", "1", "2"], "knows one guidance scale"),
        (["--passes", "10"], "--passes is for amed_multistep"),
        (["--passes", "10", "--solver", "amed_multistep", "--calls", "3-5"], "without ranges of calls"),
        (["--passes", "10", "--solver", "amed_multistep"], "of a model that is guided"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--denoiser", f"{MINE}:Mixture", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("student", [["--solver", "amed_multistep"], ["--table", "--cfg", "1", "2"]])
def test_stopped_by_its_user_it_keeps_a_state_and_goes_on_to_the_same_predictor(
    tmp_path: Path, student: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--denoiser", f"{MINE}:Mixture", "--trajectories", "16", "--calls", "3", *student]
    whole, state, file = (tmp_path / f"{name}.safetensors" for name in ("whole", "state", "file"))
    assert main([*train, "--output", str(whole)]) == 0
    made = 0

    def interrupted(self: Mixture, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal made
        made += 1
        if made == 150:
            raise KeyboardInterrupt
        return usual(self, x, sigma)

    usual = Mixture.__call__
    monkeypatch.setattr(Mixture, "__call__", interrupted)
    assert main([*train, "--output", str(file), "--state", str(state)]) == 0
    assert f"--resume {state}" in capsys.readouterr().out
    assert not file.exists()
    assert main([*train, "--output", str(file), "--resume", str(state)]) == 0
    assert same(load_predictor(file), load_predictor(whole))
    state.write_bytes(state.read_bytes()[:-7])
    assert main([*train, "--output", str(file), "--resume", str(state)]) == 2
