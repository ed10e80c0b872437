"""Which model families work with which features, found out by doing it in a real ComfyUI: the README's table.

    COMFYUI_PATH=~/comfy/ComfyUI-0.33.0 .venv-comfyui/0.33.0-*/bin/python \\
        benchmarks/model_matrix.py --output benchmarks/model_matrix.json
    python benchmarks/model_matrix.py --table benchmarks/model_matrix.json

The first measures one version, in the environment that tests/versions.py has made for it, and adds it to the file; the
second prints all of them.

Every family has ComfyUI's own classes at toy size, with random weights. A predictor is trained through the nodes,
saved, loaded and applied, and with it KSampler draws in 5 calls from noise, with denoise 0.5 and with a mask. The file
has a cell for each way of looking at the model: "pass" if all pictures are finite, drawn twice the same to the bit,
and left alone where they are masked out; else what is the matter.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import COMFYUI, WHY_NOT, load_pack, version_of
from families import SPECS, here, make
from matrix import FEATURES, cell

from benchmarks.tables import outcome


def measured() -> dict[str, dict[str, str]]:
    """For each family of this ComfyUI what it predicts, and its cells."""
    pack, rows = load_pack(), {}
    for name in here():
        sampling = make(name).model.get_model_object("model_sampling")
        rows[name] = {"predicts": pack.nodes.pairing.prediction(sampling)}
        for features in FEATURES:
            try:
                rows[name][features] = cell(pack, name, features)
            except Exception as error:  # a crash is a finding like any other
                rows[name][features] = f"fails: {type(error).__name__}: {error}"
        print(name, rows[name], flush=True)
    return rows


def table(versions: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """In Markdown, a column for each version."""
    columns = ["Family", "Latent", "Predicts", "`auto` takes", *versions]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, spec in SPECS.items():
        rows = [rows.get(name) for rows in versions.values()]
        known = next((row for row in reversed(rows) if row), None)
        if known is None:
            continue
        latent = " and ".join(" x ".join(map(str, shape)) for shape in (spec.shape, *spec.more))
        takes = known["auto"].removeprefix("pass (").removesuffix(")")
        cells = ["not in it" if row is None else outcome(row) for row in rows]
        lines.append(f"| {spec.kind} | {latent} | {known['predicts']} | {takes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="measure in this ComfyUI, and put it into this JSON file")
    parser.add_argument("--table", type=Path, help="print what this JSON file holds")
    arguments = parser.parse_args()
    file = arguments.output or arguments.table
    if file is None:
        parser.error("either --output or --table is needed")
    versions: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if arguments.output:
        if COMFYUI is None:
            raise SystemExit(WHY_NOT)
        versions[version_of(COMFYUI)] = measured()
        file.write_text(json.dumps(versions, indent=1) + "\n")
    print(table(versions))


if __name__ == "__main__":
    main()
