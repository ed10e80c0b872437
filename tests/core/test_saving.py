"""Several processes that save into one folder: nothing is lost, nothing is half there, and nothing is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from problems import midpoint_config
from trials import Trials

from amed_core import MidpointTable, save_predictor
from amed_core.files import LEFT_BEHIND, load_with_notes, save_new, save_state

pytestmark = pytest.mark.trust("saving")
PROCESSES = 2, 4  # in the suite, and of all tries

# Saves many predictors, all of which ask for the same first number, once a file of the name "go" is there.
SAVER = """
import os, sys, time
from pathlib import Path
folder, process, count, links = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "links"
sys.path += sys.argv[5:]
from problems import midpoint_config
from amed_core import MidpointTable
from amed_core.files import save_new

def none(*_):
    raise PermissionError("Operation not permitted")

if not links:
    os.link = none
table = MidpointTable(midpoint_config())
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
for number in range(count):
    save_new(table, lambda k: folder / f"same_{k:05}_.safetensors", {"process": process, "number": number})
"""


@pytest.mark.parametrize("links", ["links", "no links"])
def test_of_many_processes_that_save_at_once_no_predictor_is_lost_or_half_there(
    tmp_path: Path, trials: Trials, links: str
) -> None:
    processes = range(trials.many(*PROCESSES))
    count = trials.many(60, 1000) // len(processes)
    places = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    commands = [[sys.executable, "-c", SAVER, str(tmp_path), str(p), str(count), links, *places] for p in processes]
    savers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    for saver in savers:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    found: dict[Path, tuple[int, int]] = {}
    running = True
    while running:
        running = any(saver.poll() is None for saver in savers)
        for path in sorted(set(tmp_path.glob("*.safetensors")) - set(found)):
            notes = load_with_notes(path)[1]  # as soon as it is seen; an error would end the test
            found[path] = notes["process"], notes["number"]
    assert [saver.wait() for saver in savers] == [0] * len(processes)
    for process in processes:
        for number in range(count):
            trials.held(f"{links}: {process}, {number}", (process, number) in found.values(), "it is lost")
    assert len(found) == len(processes) * count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", *sorted(path.name for path in found)]


@pytest.fixture
def table() -> MidpointTable:
    return MidpointTable(midpoint_config())


def test_what_a_dead_process_left_goes_after_a_day_when_something_is_saved_there(
    tmp_path: Path, table: MidpointTable
) -> None:
    """And nothing else does: neither what may still be written nor what looks alike."""
    names = [".amed-0123456789abcdef.tmp", ".amed-fedcba9876543210.tmp", ".amed-notes.txt", "amed-1.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half a fi")
    long_ago = time.time() - LEFT_BEHIND - 60
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, (long_ago, long_ago))
    save_predictor(table, tmp_path / "p.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "p.safetensors"])


KILLED = """
import os, sys
from pathlib import Path
sys.path += sys.argv[2:]
from problems import midpoint_config
from amed_core import MidpointTable, save_predictor
os.replace = lambda *_: os.kill(os.getpid(), 9)
save_predictor(MidpointTable(midpoint_config()), Path(sys.argv[1]))
"""


def test_killed_before_a_file_has_its_name_it_leaves_what_the_next_day_removes(
    tmp_path: Path, table: MidpointTable
) -> None:
    path = tmp_path / "p.safetensors"
    places = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    assert subprocess.run([sys.executable, "-c", KILLED, str(path), *places], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".amed-")
    save_predictor(table, path)
    assert left.exists()
    long_ago = time.time() - LEFT_BEHIND - 60
    os.utime(left, (long_ago, long_ago))
    save_predictor(table, path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_names_that_there_are_can_be_written(tmp_path: Path, table: MidpointTable) -> None:
    name = f"{'x' * (255 - len('.safetensors'))}.safetensors"
    save_predictor(table, tmp_path / name)
    save_state(tmp_path / name.replace("x", "y"), {"a": 1})
    assert save_new(table, lambda number: tmp_path / (str(number) * 255)).name == "1" * 255


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, table: MidpointTable) -> None:
    with pytest.raises(ValueError, match="too many for one file"):
        save_predictor(table, tmp_path / "p.safetensors", {"prompts": "x" * (1 << 20)})
    assert not list(tmp_path.iterdir())
