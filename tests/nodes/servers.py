"""A real ComfyUI with this pack: started headless on the CPU, and spoken to over HTTP."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui import COMFYUI, PACK

START_SECONDS, RUN_SECONDS = 180, 300


@dataclass
class Server:
    """A running ComfyUI with this pack installed in a folder of its own."""

    port: int
    base: Path
    arguments: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes]" = field(init=False)

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--preview-method", "latent2rgb", "--disable-api-nodes"]
        with (self.base / "server.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [*command, *self.arguments], cwd=COMFYUI, stdout=log, stderr=log, env=environment
            )
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < limit, self.log()
                time.sleep(0.2)

    def kill(self) -> None:
        """As the system does that runs out of memory."""
        self.process.kill()
        self.process.wait(30)

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

    def queue(self, graph: dict[str, Any], **more: Any) -> str:
        answer = self.post("/prompt", {"prompt": graph, **more})
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


@contextlib.contextmanager
def started(base: Path, *arguments: str) -> Iterator[Server]:
    """ComfyUI with its folders at `base`, which another one may have used before. At the end it is stopped."""
    assert COMFYUI is not None
    (base / "custom_nodes").mkdir(exist_ok=True)
    if not (base / "custom_nodes" / "ComfyUI-AMED").exists():
        (base / "custom_nodes" / "ComfyUI-AMED").symlink_to(PACK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = Server(port, base, arguments)
    try:
        running.start()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)
