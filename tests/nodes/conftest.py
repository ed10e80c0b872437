"""A real ComfyUI for the node tests: found, started headless on the CPU, and spoken to over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for `comfyui` and `graphs`
from comfyui import COMFYUI, PACK, WHY_NOT, load_pack
from families import SPECS, Family, here, make

START_SECONDS, RUN_SECONDS = 180, 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = set(SPECS) - set(here())
    for item in items:
        if Path(item.fspath).parent != Path(__file__).parent:
            continue
        if COMFYUI is None:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            if isinstance(value, str) and value in lacking:
                item.add_marker(pytest.mark.skip(reason=f"this ComfyUI has no {SPECS[value].kind}"))


@pytest.fixture(scope="session")
def pack() -> Any:
    """This pack, imported as ComfyUI imports it, in this process."""
    return load_pack()


@pytest.fixture(scope="module")
def flux(pack: Any) -> Family:
    """A toy of one family, which the tests of a module share; those that change it have one of their own."""
    del pack
    return make("flux")


@pytest.fixture(autouse=True)
def user(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Where the states of fits are kept: every test has a folder of its own, so that none goes on from another's."""
    if "pack" not in request.fixturenames:
        return None
    import folder_paths  # noqa: PLC0415 - ComfyUI's

    registered = request.getfixturevalue("pack").nodes.registration.FOLDER
    paths, kinds = folder_paths.folder_names_and_paths[registered]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, registered, ([str(tmp_path / "models"), *paths[1:]], kinds)
    )
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path / "amed_training"


@pytest.fixture
def models(user: Path, tmp_path: Path) -> Path:
    """Where predictors are saved, which is a folder of this test's own."""
    del user
    return tmp_path / "models"


@dataclass
class Server:
    """A running ComfyUI with this pack installed in a folder of its own."""

    port: int
    base: Path
    process: "subprocess.Popen[bytes]"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            return {"error": json.loads(error.read())}
        return json.loads(text) if text else {}

    def queue(self, graph: dict[str, Any]) -> str:
        answer = self.post("/prompt", {"prompt": graph})
        assert "error" not in answer, json.dumps(answer, indent=1)
        prompt_id: str = answer["prompt_id"]
        return prompt_id

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """The finished run's history entry."""
        limit = time.monotonic() + RUN_SECONDS
        while time.monotonic() < limit:
            if (history := self.get(f"/history/{prompt_id}").get(prompt_id)) is not None:
                return dict(history)
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        raise TimeoutError(f"the run did not finish within {RUN_SECONDS} s\n{self.log()}")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Queue a graph that must succeed; its outputs per node."""
        history = self.wait(self.queue(graph))
        assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1) + self.log()
        return dict(history["outputs"])

    def fail(self, graph: dict[str, Any]) -> str:
        """Queue a graph that must fail while it runs; the error message that the user sees."""
        history = self.wait(self.queue(graph))
        messages = dict(history["status"]["messages"])
        assert "execution_error" in messages, history["status"]
        return str(messages["execution_error"]["exception_message"])

    def log(self) -> str:
        return (self.base / "server.log").read_text()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert COMFYUI is not None
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "ComfyUI-AMED").symlink_to(PACK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--preview-method", "latent2rgb", "--disable-api-nodes"]
    with (base / "server.log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=log, env=environment)
    running = Server(port, base, process)
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                running.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, running.log()
                assert time.monotonic() < limit, running.log()
                time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(30)
