"""The script that trains the text-to-picture model: it trains, leaves weights that load, and goes on where it was."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from amed_core.pictures import load_pictures

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_pictures.py"
SMALL = ("--batch", "2", "--vae-batch", "1", "--copies", "1")


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--data", str(folder / "drawings.npz"), "--output", str(folder), *SMALL]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawings of noise, and what a few steps make of them."""
    made = tmp_path_factory.mktemp("pictures")
    drawings = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 4), dtype=np.uint8)
    names = np.array(["red apple", "green apple", "red sun", "moon"])
    np.savez_compressed(made / "drawings.npz", drawings=drawings, names=names)
    run(made, "--vae-seconds", "2", "--seconds", "8")
    return made


def test_it_leaves_weights_that_load_and_a_sheet(folder: Path) -> None:
    model = load_pictures(folder / "pictures.safetensors")
    assert list(model.config.names) == ["red apple", "green apple", "red sun", "moon"]
    assert (folder / "look.png").stat().st_size > 10_000, "no sheet of one colour"


def test_it_goes_on_from_its_state_with_the_same_drawings_alone(folder: Path) -> None:
    again = run(folder, "--resume", str(folder / "state.safetensors"), "--seconds", "6")
    assert "4 drawings" in again
    others = np.load(folder / "drawings.npz")
    np.savez_compressed(folder / "drawings.npz", drawings=others["drawings"][:3], names=others["names"][:3])
    with pytest.raises(AssertionError, match="drawings"):
        run(folder, "--resume", str(folder / "state.safetensors"), "--seconds", "6")
