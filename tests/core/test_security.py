"""What SECURITY.md promises: what is shipped opens no connection, unpickles nothing, and runs no text or program."""

import ast
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.trust("supply")
ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    *("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("socket", "ssl", "urllib", "http", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub"),
    *("subprocess", "multiprocessing", "pty", "pip", "ctypes", "cffi", "importlib", "runpy", "code"),
    *("torch.load", "torch.save", "torch.hub", "torch.package", "torch.distributed", "torch.utils.cpp_extension"),
    *("os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "os.fork*", "os.startfile"),
    *("numpy.load", "np.load", "builtins"),
)
CALLS = ("eval", "exec", "compile", "__import__")
# The command line alone reaches these, of which nodes import nothing: it imports the Python file that its user names as
# a denoiser, and joins the processes that its user started by torchrun.
COMMAND_LINE = {
    ("amed_core/tools/command_line.py", "importlib.util"),
    ("amed_core/fit/workers.py", "importlib"),
    ("amed_core/fit/workers.py", "torch.distributed"),
}
# ComfyUI's own page asks its own server what a predictor file is for; aiohttp gives the answer its form.
ANSWER = {("nodes/routes.py", "aiohttp")}
EXCEPTIONS = COMMAND_LINE | ANSWER


def left_out(name: str) -> bool:
    """Whether a file or folder of the repository's root is not shipped, or is in no clone."""
    lines = [
        line.strip("/")
        for file in (".comfyignore", ".gitignore")
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
    ]
    return name.startswith(".") or any(fnmatch.fnmatch(name, line) for line in lines)


SHIPPED = [
    file
    for top in sorted(ROOT.iterdir())
    if not left_out(top.name)
    for file in ([top] if top.suffix == ".py" else sorted(top.rglob("*.py")))
]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; of anything else what follows its last dot without a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def has(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name is one of these, or lies in one."""
    parts = name.split(".")
    starts = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatch(start, pattern) for start in starts for pattern in patterns)


def forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and names of what is imported from elsewhere, used as a part of it, or called, and must not be."""
    parts = [pattern for pattern in FORBIDDEN if "." in pattern]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if has(alias.name, FORBIDDEN)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in names if has(name, FORBIDDEN)]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)] if has(dotted(node), parts) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in CALLS else []
        yield from ((node.lineno, name) for name in names)  # type: ignore[attr-defined]


def found(file: Path) -> list[tuple[int, str]]:
    return list(forbidden(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.trust("supply")
@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_what_is_shipped_uses_nothing_that_is_forbidden(file: Path) -> None:
    allowed = [name for place, name in EXCEPTIONS if place == name_of(file)]
    assert [f"{name_of(file)}:{line} {name}" for line, name in found(file) if not has(name, allowed)] == []


def test_no_exception_is_kept_that_nobody_needs() -> None:
    for place, name in EXCEPTIONS:
        assert any(has(other, [name]) for _, other in found(ROOT / place)), (place, name)


@pytest.mark.trust("supply")
def test_nodes_reach_no_exception() -> None:
    """They import no tools; and of `workers`, which fits import, only the command line calls `torchrun`."""
    for file in SHIPPED:
        text = file.read_text(encoding="utf-8")
        if file.parent.name == "nodes":
            assert "amed_core.tools" not in text, file
        if name_of(file) not in ("amed_core/tools/command_line.py", "amed_core/fit/workers.py"):
            assert "torchrun(" not in text, file


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "import urllib.request", "from torch import load", "from os import system", "eval('1')"),
        *("torch.load('a')", "os.execv('a', [])", "import torch.distributed.nn", "from subprocess import run"),
    ],
)
def test_the_rule_sees_all_forms(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize("line", ["model.eval()", "self.load('a')", "from .code import a", "os.fsync(a)", "http.a"])
def test_the_rule_sees_no_more_than_that(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))


def test_all_that_is_run_is_looked_at() -> None:
    tops = {name_of(file).split("/")[0] for file in SHIPPED}
    assert tops >= {"__init__.py", "amed_core", "nodes"}
    assert not tops & {"tests", "scripts", "benchmarks", "docs"}


# A child process, since a hook cannot be taken away. Libraries are imported before it is set: what they do then is
# theirs. Python itself reports `exec` and `compile` for every import and every dataclass.
WATCHED = """
import json, sys, tempfile
from pathlib import Path
import numpy, safetensors.torch, scipy.optimize, torch

sys.path.append(sys.argv[1])
CORE, events = str(Path(sys.argv[1]) / "amed_core"), []
ANYONES = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile",
           "pickle.", "urllib.", "http.", "ftplib.", "smtplib.", "ctypes.")

def hook(event, arguments):
    if event.startswith(ANYONES):
        events.append(event)
    elif event in ("exec", "compile") and sys._getframe(1).f_code.co_filename.startswith(CORE):
        events.append(f"{event} by {sys._getframe(1).f_code.co_filename}")

sys.addaudithook(hook)
import amed_core

class Model:
    shape, sigma_min, sigma_max = (2,), 0.01, 10.0
    def __call__(self, x, sigma):
        return x / (1 + sigma**2)

predictor = amed_core.fit_predictor(Model(), "amed_multistep", calls=3).predictor
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "predictor.safetensors"
    amed_core.save_predictor(predictor, file)
    predictor = amed_core.load_predictor(file)
sample = amed_core.sample(Model(), 10 * torch.ones(1, 2), predictor.method())
# At last, that the hook sees such things.
seen = list(events)
import pickle
pickle.loads(pickle.dumps(Path("a")))
print(json.dumps({"seen": seen, "then": events[len(seen):], "finite": bool(sample.isfinite().all())}))
"""


@pytest.mark.trust("supply")
def test_a_fit_opens_nothing_and_runs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROOT)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finite"]
    assert result["seen"] == []
    assert "pickle.find_class" in result["then"]
