"""The tests: the core's in this environment, and the nodes' in every ComfyUI found, each in an environment of its own.

    python tests/versions.py                                  # every ComfyUI that it finds
    python tests/versions.py ~/elsewhere/ComfyUI              # and this one
    python tests/versions.py -- -k guidance                   # arguments for pytest

It looks at COMFYUI_PATH, which may name several, at the ComfyUI whose custom_nodes this clone stands in, at
~/comfy/ComfyUI and at ~/comfy/ComfyUI-*. Their requirements exclude one another, so each has an environment in
.venv-comfyui, which is made once and kept until its requirements change. The last lines say for each version how many
node tests ran, or why none did, and whether the bundled models' pictures are the same in all of them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).parent / "nodes"))
from comfyui import PACK, WHY_NOT, each_once, found, is_comfyui, named, summary, version_of

TESTS = Path(__file__).parent
ENVIRONMENTS = PACK / ".venv-comfyui"
ALSO = ["requests", "pytest", "pytest-xdist"]  # ComfyUI 0.3.64 imports requests, but does not list it
if shutil.which("chromium"):  # what a person sees is tested where there is a browser
    ALSO.append("playwright")
# Only the Python parts of these are used, so their compiled parts may be made for another torch, or for a GPU. With
# their dependencies they would bring another torch.
APART = ("torchvision==0.16.2", "torchaudio==2.11.0", "spandrel==0.4.2")
SUITES = [str(TESTS / "nodes"), str(TESTS / "browser")]  # of a ComfyUI
NOTHING_SELECTED = 5  # pytest's exit code


class NoEnvironmentError(Exception):
    """An environment could not be made; the message says why."""


def places(arguments: Sequence[str]) -> list[Path]:
    """Where node tests are to run, oldest version first: what is named is among them even if there is no ComfyUI."""
    chosen = each_once([*(Path(argument) for argument in arguments), *named(), *found()])
    return sorted(chosen, key=lambda place: [int(part) for part in re.findall(r"\d+", version_of(place))])


def requirements(place: Path) -> list[str]:
    """What its environment needs, but for what is installed apart."""
    apart = {"torch", *(pin.split("==")[0] for pin in APART)}
    lines = (place / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [*(line for line in wanted if re.split(r"[^\w.-]", line)[0].lower() not in apart), *ALSO]


def torch_pin() -> str:
    """The torch of this environment: a plain requirement would bring another build of gigabytes."""
    return f"torch=={version('torch').split('+')[0]}"


def environment_of(place: Path) -> Path:
    """The folder of its environment, which has another name for other requirements."""
    contents = "\n".join([sys.version, torch_pin(), *APART, *requirements(place)])
    name = re.sub(r"[^\w.-]", "-", version_of(place))
    return ENVIRONMENTS / f"{name}-{hashlib.sha256(contents.encode()).hexdigest()[:8]}"


def python_of(environment: Path) -> Path:
    """Its interpreter."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(place: Path, run: Callable[[Sequence[str]], None]) -> Path:
    """Its interpreter, in an environment that is there or is made now; one that was made half is made anew."""
    environment = environment_of(place)
    python, complete = python_of(environment), environment / "complete"
    if complete.exists():
        return python
    for outdated in ENVIRONMENTS.glob(f"{environment.name.rpartition('-')[0]}-*"):
        shutil.rmtree(outdated)
    run([sys.executable, "-m", "venv", str(environment)])
    wanted, constraints = environment / "requirements.txt", environment / "constraints.txt"
    wanted.write_text("\n".join([torch_pin(), *requirements(place)]))
    constraints.write_text(torch_pin())
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, "-c", str(constraints), "-r", str(wanted)])
    run([*install, "--no-deps", *APART])
    for library in environment.rglob("torchaudio/lib/*"):  # may be linked to a GPU's libraries; it works without them
        if library.suffix in (".so", ".pyd", ".dylib"):
            library.unlink()
    complete.touch()
    return python


def run_quietly(command: Sequence[str]) -> None:
    """Run a command; raises NoEnvironmentError with its last words if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, flush=True)
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "it said nothing")
        raise NoEnvironmentError(f"its environment could not be made: {last}")


def node_tests(place: Path, python: Future[Path], extra: Sequence[str]) -> tuple[str, bool]:
    """Run them in this ComfyUI: the line that says how many ran, or why none, and whether all is well."""
    none = f"node tests in ComfyUI {version_of(place)} ({place}): none, "
    try:
        interpreter = python.result()
    except (NoEnvironmentError, OSError) as error:
        return f"{none}{error}", False
    print(f"\nnode tests in ComfyUI {version_of(place)} ({place})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [str(interpreter), "-m", "pytest", *SUITES, f"--junitxml={results}", *extra]
        code = subprocess.run(command, env={**os.environ, "COMFYUI_PATH": str(place)}, check=False).returncode
        if not results.exists():
            return f"{none}pytest ended with exit code {code}", False
        suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    total, failed, skipped, errors = (int(suite.get(n, 0)) for n in ("tests", "failures", "skipped", "errors"))
    line = summary(place, total - failed - skipped - errors, failed, skipped, errors)
    return line, code in (0, NOTHING_SELECTED if extra else 0)


def same_pictures(pythons: Sequence[tuple[Path, Future[Path]]]) -> tuple[str, bool]:
    """Whether the bundled models draw the same pictures in all versions, to the bit: a line that says so, and if so."""
    drawn: dict[str, dict[str, str]] = {}
    for place, python in pythons:
        if python.exception() is not None:
            continue
        command = [str(python.result()), str(TESTS / "nodes" / "same_pictures.py")]
        environment = {**os.environ, "COMFYUI_PATH": str(place)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return f"pictures of the bundled models: not drawn in {version_of(place)}", False
        drawn[version_of(place)] = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(drawn.values()), {})
    others = sorted({file for found in drawn.values() for file in first if found.get(file) != first[file]})
    where = f"with {len(first)} shipped predictors in {', '.join(drawn)}"
    said = f"differ with {', '.join(others)}" if others else "the same to the bit"
    return f"pictures of the bundled models {where}: {said}", not others


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 if all is well."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, extra = places(arguments[:cut]), arguments[cut + 1 :]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, with models too small for threads

    def prepared(place: Path) -> Path:
        if not is_comfyui(place):
            raise NoEnvironmentError("there is no ComfyUI")
        return make_environment(place, run_quietly)

    with ThreadPoolExecutor(len(chosen) or 1) as threads:  # installed while the core's tests run
        pythons = [threads.submit(prepared, place) for place in chosen]
        core = subprocess.run([sys.executable, "-m", "pytest", str(TESTS / "core"), *extra], check=False).returncode
        well = core in (0, NOTHING_SELECTED if extra else 0)
        ran = [node_tests(place, python, extra) for place, python in zip(chosen, pythons, strict=True)]
        if len(chosen) > 1 and not extra:
            ran.append(same_pictures(list(zip(chosen, pythons, strict=True))))
    print()
    for line, _ in ran:
        print(line)
    if not ran:
        print(f"node tests: none, {WHY_NOT}")
    return 0 if well and all(fine for _, fine in ran) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
