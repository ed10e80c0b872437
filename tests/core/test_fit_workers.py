"""Two processes fit as one: `torchrun` on PyTorch's own package, with gloo on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Mixture

from amed_core import load_predictor, sample
from amed_core.files import read_notes
from amed_core.fit.workers import Workers

ROOT = Path(__file__).parents[2]

MINE = Path(__file__).with_name("denoisers.py")


@pytest.mark.parametrize(
    "what",
    [
        ["--trajectories", "48", "--batch-size", "8", "--held-out", "8"],
        ["--table", "--trajectories", "12", "--cfg", "1.0", "1.5"],
        ["--solver", "amed_multistep", "--trajectories", "24", "--batch-size", "8", "--held-out", "8"],
    ],
)
def test_two_processes_fit_what_one_fits(tmp_path: Path, what: list[str]) -> None:
    train = ["-m", "amed_core", "train", "--denoiser", f"{MINE}:Mixture", *what, "--output"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    made = []
    for count, command in ((1, [sys.executable]), (2, [sys.executable, *two])):
        file = tmp_path / f"{count}.safetensors"
        done = subprocess.run([*command, *train, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("sample calls of training") == 1, "only one of them speaks"
        made.append((load_predictor(file).state_dict(), read_notes(file)["training"]))
    (one, notes), (both, notes_of_both) = made
    if "amed_multistep" in what:  # numbers that do nearly the same may trade places: what counts is what they do
        samples, of_both = (drawn(tmp_path, f"{count}.safetensors") for count in (1, 2))
        assert float((samples - of_both).square().mean().sqrt()) < 1e-4 * float(samples.square().mean().sqrt())
    else:
        for name, weight in one.items():
            torch.testing.assert_close(both[name], weight, rtol=1e-3, atol=1e-4)
    assert notes_of_both["model_calls"] == notes["model_calls"]
    # A multistep fit's last digits hang on rounding: its numbers are more than the few directions of these samples.
    assert notes_of_both["error"] == pytest.approx(notes["error"], rel=1e-2 if "amed_multistep" in what else 1e-3)


LEAVES = """
import gc, os, threading
import torch
from amed_core.fit.workers import torchrun

with torchrun() as workers:
    total = workers.sum(torch.ones(3))
    import torch._dynamo
    inside = len(os.listdir("/proc/self/task"))
gc.collect()
print("sum", total.tolist(), "threads", inside, len(os.listdir("/proc/self/task")), threading.active_count())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*two, str(tmp_path / "leaves.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r"sum \[2.0, 2.0, 2.0\] threads (\d+) (\d+) (\d+)", done.stdout)
    assert len(told) == 2, done.stdout
    for inside, after, of_python in told:
        assert int(inside) > int(after), "the group had threads of its own"
        assert after == of_python, "at the end of the process they would need an interpreter that is gone"


def drawn(folder: Path, name: str) -> torch.Tensor:
    """What a predictor makes of the same noise."""
    x = 80.0 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    return sample(Mixture(), x, load_predictor(folder / name).method())


def test_every_trajectory_has_one_worker() -> None:
    rows = range(5, 28)
    shares = [Workers(rank, 3).share(rows) for rank in range(3)]
    assert [row for share in shares for row in share] == list(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
