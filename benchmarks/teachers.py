"""How far slow samplers end from a converged one, and what a path itself shows of that (`own_errors`).

python benchmarks/teachers.py --models digits colours mixture --json benchmarks/teachers.json
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.driver import NoMidpoint
from amed_core.fit.huber import squares
from amed_core.fit.teacher import SLOW, levels, own_errors, path_of
from amed_core.solvers import DpmSolverPP, Ipndm, Solver
from amed_core.tools.first import USES, Bed
from amed_core.types import Method
from benchmarks.beds import MODELS


def slow(flow: bool) -> dict[str, Solver]:
    """Slow samplers with one call per step, by name."""
    listed: dict[str, Solver] = {"teacher": SLOW, "euler": Ipndm(1), "ipndm-2": Ipndm(2), "ipndm-3": Ipndm(3)}
    return listed | {"dpmpp-2": DpmSolverPP(2, flow=flow)}


def measured(bed: Bed, calls: int) -> dict[str, float]:
    """Errors of slow samplers, and `shown`, what the teacher's own path shows of its error."""
    denoiser, x, goal = bed.parts[0]
    errors = {}
    for name, solver in slow(bed.flow).items():
        grid = levels(bed.low, bed.high, calls, bed.flow)
        passed = path_of(denoiser, x, Method(grid, solver, NoMidpoint()))
        errors[name] = math.sqrt(float(squares(passed.end, goal).mean()))
        if solver is SLOW:
            errors["shown"] = math.sqrt(float(own_errors(passed, bed.flow).mean()))
    return errors


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 3.0, 6.0])
    parser.add_argument("--calls", nargs="+", type=int, default=[24, 48])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    for name in asked.models:
        for cfg in asked.cfg:
            for use, level, _ in USES[:3:2]:
                bed = Bed(MODELS[name](cfg), level, asked.samples, asked.samples)
                for calls in asked.calls:
                    found = measured(bed, calls)
                    rows.append({"model": name, "cfg": cfg, "use": use, "calls": calls, **found})
                    print(name, cfg, use, calls, *(f"{key} {error:.4f}" for key, error in found.items()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
