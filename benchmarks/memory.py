"""How much more memory a fit takes than sampling, for every model family that this ComfyUI has, on a CPU.

    COMFYUI_PATH=~/comfy/ComfyUI-0.33.0 .venv-comfyui/0.33.0-*/bin/python \\
        benchmarks/memory.py --json benchmarks/memory.json
    python benchmarks/memory.py --table benchmarks/memory.json

The first adds what it measures to the file, and leaves out what that has. Each family has a process of its own, with
ComfyUI's own classes at toy size, random weights, and a latent twice as high and wide as the tests'. "loaded" is the
resident memory with the model, a first picture and a first fit at the tests' size behind it, "sampling" the peak of
stock's ipndm, two pictures at once, and "fit" that of a quick fit of the training node in batches of two. The goal is a
fit of at most 1.15 times sampling. A GPU's memory: gpu.py.
"""

import argparse
import contextlib
import gc
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import COMFYUI, WHY_NOT, load_pack, version_of
from families import SPECS, Family, here, joined, make
from toys import k_sample, streams, train

LARGER, ROWS, MOST = 2, 2, 1.15
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """MiB of this process: VmRSS is what it has, VmHWM the most that it had."""
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak(work: Callable[[], Any]) -> float:
    """The most MiB that the process has while it works."""
    gc.collect()
    REFERENCES.write_text("5")  # forgets the most so far
    work()
    return resident("VmHWM")


def larger(name: str) -> Family:
    """A family with a latent of two samples, twice as high and wide, or long, as the tests'."""
    *sizes, height, width = SPECS[name].shape
    shape = (*sizes, LARGER * height, LARGER * width) if sizes else (height, LARGER * width)
    family = make(name, shape=shape)
    latents = [one.expand(ROWS, *one.shape[1:]).contiguous() for one in streams(family.latent["samples"])]
    return replace(family, latent={"samples": joined(latents)})


def measure(name: str) -> dict[str, Any]:
    """One family."""
    torch.set_num_threads(1)
    pack, family = load_pack(), larger(name)

    def drawn() -> None:
        k_sample(family, family.model, 5, 3.0, "ipndm", "simple")

    def fitted(family: Family) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            train(pack, family, steps=5, effort="quick", trajectories=4, held_out=2, teacher_calls=12)

    drawn()
    fitted(make(name))  # what it imports is no matter of its size
    row = {"loaded": resident("VmRSS"), "sampling": peak(drawn), "fit": peak(lambda: fitted(family))}
    return {key: round(mib, 1) for key, mib in row.items()} | {"of_sampling": round(row["fit"] / row["sampling"], 3)}


def table(versions: dict[str, dict[str, Any]]) -> str:
    """In Markdown, and how many reach the goal."""
    lines = ["| Family | ComfyUI | loaded MiB | sampling | fit | of sampling |", "|---|---|---|---|---|---|"]
    every = [(SPECS[name].kind, version, row) for version, rows in versions.items() for name, row in rows.items()]
    for kind, version, row in sorted(every, key=lambda one: -one[2]["of_sampling"]):
        figures = " | ".join(f"{row[key]:.0f}" for key in ("loaded", "sampling", "fit"))
        lines.append(f"| {kind} | {version} | {figures} | {row['of_sampling']:.3f} |")
    well = sum(row["of_sampling"] <= MOST for _, _, row in every)
    return "\n".join([*lines, "", f"{well} of {len(every)} take at most {MOST} times sampling"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file to add to")
    parser.add_argument("--table", type=Path, help="print a file")
    parser.add_argument("--family", choices=SPECS, help="measure one, and print its row")
    how = parser.parse_args()
    if how.table:
        print(table(json.loads(how.table.read_text(encoding="utf-8"))))
        return
    if COMFYUI is None:
        raise SystemExit(WHY_NOT)
    if how.family:
        print(json.dumps(measure(how.family)))
        return
    known = json.loads(how.json.read_text(encoding="utf-8")) if how.json.exists() else {}
    rows = known.setdefault(version_of(COMFYUI), {})
    for name in here():
        if name in rows:
            continue
        command = [sys.executable, __file__, "--family", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        if done.returncode:
            print(f"{name}: exit {done.returncode}", flush=True)
            continue
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
        how.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
