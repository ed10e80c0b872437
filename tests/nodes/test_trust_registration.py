"""Where something of others is at fault, stock sampling is as it was, and the log says what is missing and why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfyui import COMFYUI, PACK
from faults import FAULTS, MODULE

from amed_core.samplers import NAMES

pytestmark = [
    pytest.mark.trust("registration"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each fault has a forked process"),
]
NODES = 13
# What the log says; where it is left out, all is there, and nothing is said.
FOLDER = "The folder of your predictors cannot be made"
SHOWN = "The browser does not show what predictor files are for"
SAID = {
    "a file in the folder's place": FOLDER,
    "models is a file": FOLDER,
    "read-only": FOLDER,
    "a missing drive": FOLDER,
    "a server without routes": SHOWN,
    "a server with other routes": SHOWN,
    "no aiohttp": SHOWN,
    "folder table read-only": "Predictor files cannot be listed",
    "files cannot be listed": "The node AMEDLoadPredictor is missing (PermissionError",
    "no scipy": "No module named 'scipy",
}
FROZEN = "another pack has frozen them"
SAID |= {name: FROZEN for name in FAULTS if "list a tuple" in name or "list frozen" in name}
SAID["scheduler table read-only"] = FROZEN
NOT_LISTED = ("folder table read-only", "files cannot be listed")
SOME_MODULES = ("nodes.compare", "amed_core.samplers")
SOME_FAULTS = (
    *("none", "two copies of the pack", "a file in the folder's place", "sampler list a tuple", "no aiohttp"),
    *("scheduler table read-only", "sampler list frozen half way", "sampler list copied", "folder table read-only"),
)


def answers(place: Path, names: list[str]) -> dict[str, Any]:
    """How ComfyUI is under each fault."""
    command = [sys.executable, str(Path(__file__).parent / "faults.py"), str(COMFYUI), str(place / "a.json"), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=COMFYUI, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((place / "a.json").read_text())
    return found


def why_harmed(fault: str, found: dict[str, Any] | None) -> str:
    """What is not as promised, in words; nothing if all is."""
    if found is None:
        return "ComfyUI does not start"
    loaded = fault != "no scipy" and not fault.startswith(MODULE)
    words = f"{fault.removeprefix(MODULE)} is at fault" if fault.startswith(MODULE) else SAID.get(fault)
    listed = loaded and words != FROZEN
    names = {"samplers": list(NAMES), "KSampler's samplers": list(NAMES)}
    ours = {kind: names.get(kind, ["amed"]) if listed else [] for kind in found["ours"]}
    promises = {
        "another sample of stock samplers": found["stock"],
        "names of others are gone": found["kept"],
        "a sampler without a function": found["functions"],
        "a scheduler without a function": found["handlers"],
        f"ours are {found['ours']}": found["ours"] == ours,
        f"nodes {found['nodes']}": len(found["nodes"]) == (loaded and NODES - (fault in NOT_LISTED)),
        "shipped predictors are not listed": found["shipped"] == (loaded and fault not in NOT_LISTED),
        "it does not sample": found["learns"] == listed,
        "the server does not start": found["started"],
        f"said {found['log']}": len(found["log"]) == bool(words) and all(str(words) in line for line in found["log"]),
        f"saving: {found['saves']}": saves_as_it_should(fault, found),
    }
    return ", ".join(broken for broken, kept in promises.items() if not kept)


def saves_as_it_should(fault: str, found: dict[str, Any]) -> bool:
    """Where the folder cannot be made the error names it, and elsewhere a predictor is saved."""
    if not found["shipped"]:
        return found["saves"] == "there is none to save"
    if SAID.get(fault) == FOLDER:
        return "Error" in found["saves"] and ("models" in found["saves"] or "/proc" in found["saves"])
    return found["saves"] == "saved as again_00001_.safetensors"


def test_a_fault_of_others_harms_nothing(tmp_path: Path, trials: Any) -> None:
    """Nor does a module of ours that cannot be imported: names come last, when everything has been."""
    names = [*SOME_FAULTS, *(MODULE + name for name in SOME_MODULES)]
    if trials.full:
        modules = [name for name in answers(tmp_path, ["none"])["none"]["modules"] if name]
        assert set(SOME_MODULES) <= set(modules)
        assert len(modules) > len(list((PACK / "nodes").glob("*.py")))
        names = [*FAULTS, *(MODULE + name for name in modules)]
    for fault, found in answers(tmp_path, names).items():
        why = why_harmed(fault, found)
        trials.held(fault, not why, why)
