"""Draw a picture on a running ComfyUI with the sampler amed, with nothing but Python's standard library.

    python docs/api/draw.py "strawberry" --seed 7 --output strawberry.png

The first pictures of a model are drawn slowly and teach the sampler; those after them take 5 model calls.

The graph beside this file, graph.json, is what *Export (API)* in ComfyUI's menu writes. Any other one can take its
place, if the nodes that are changed here have the same titles.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

GRAPH = Path(__file__).with_name("graph.json")
Graph = dict[str, dict[str, Any]]


def asked(address: str, body: Any = None) -> bytes:
    """What the server answers; raises RuntimeError with its own words if it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: bytes = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{address} answered {error.code}: {error.read().decode(errors='replace')}") from error
    return found


def titled(graph: Graph, title: str) -> dict[str, Any]:
    """The inputs of the one node with this title."""
    inputs: dict[str, Any]
    (inputs,) = (node["inputs"] for node in graph.values() if node["_meta"]["title"] == title)
    return inputs


def finished(server: str, prompt_id: str, limit: float) -> dict[str, Any]:
    """The outputs of a run, once it has ended; raises RuntimeError if it failed, and TimeoutError after `limit` s."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        history = json.loads(asked(f"{server}/history/{prompt_id}")).get(prompt_id)
        if history is None:
            time.sleep(0.2)
            continue
        if history["status"]["status_str"] != "success":
            messages = dict(history["status"]["messages"])
            said = messages.get("execution_error", {}).get("exception_message", "it was stopped")
            raise RuntimeError(f"The run failed: {said}")
        outputs: dict[str, Any] = history["outputs"]
        return outputs
    raise TimeoutError(f"The run did not end within {limit:g} s.")


def draw(server: str, graph: Graph, limit: float = 600) -> bytes:
    """Queue a graph and wait: the file of its first picture."""
    prompt_id = json.loads(asked(f"{server}/prompt", {"prompt": graph}))["prompt_id"]
    outputs = finished(server, prompt_id, limit)
    picture = next(image for output in outputs.values() for image in output.get("images", []))
    return asked(f"{server}/view?{urllib.parse.urlencode(picture)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="strawberry")
    parser.add_argument("--negative", default="")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("picture.png"))
    arguments = parser.parse_args()
    graph: Graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    titled(graph, "Prompt")["text"] = arguments.prompt
    titled(graph, "Negative prompt")["text"] = arguments.negative
    titled(graph, "KSampler")["seed"] = arguments.seed
    try:
        arguments.output.write_bytes(draw(arguments.server.rstrip("/"), graph))
    except (RuntimeError, TimeoutError, urllib.error.URLError) as error:
        sys.exit(f"No picture from {arguments.server}: {error}")
    print(arguments.output)


if __name__ == "__main__":
    main()
