"""What SECURITY.md promises, watched in a real ComfyUI, and who the licences belong to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import COMFYUI


@pytest.mark.trust("supply")
def test_the_pack_opens_no_connection_and_runs_nothing(tmp_path: Path) -> None:
    """And it writes in its own folders alone."""
    command = [sys.executable, str(Path(__file__).parent / "watched.py"), str(COMFYUI), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=COMFYUI, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("WATCHED", 1)[1])
    assert found["events"] == []
    assert any("pickle.find_class" in event for event in found["then"]), "such a thing would have been seen"
    own = ("models/amed_predictors", "user/amed_training", "user/amed_learned", "temp")
    own += ("models/amed_predictors/unfinished",)  # where a finished predictor waits until it is saved
    written = {Path(file).parent for file in found["written"]}
    assert written <= {tmp_path / folder for folder in own}
    assert {folder.name for folder in written} >= {"amed_predictors", "amed_learned"}
