"""The tables of both READMEs, docs/experiments.md and docs/trust.md, written from what measurements left as JSON.

    python benchmarks/tables.py                                           # rewrites every marked table
    python benchmarks/tables.py --check                                   # fails if any is not what it would write
    python benchmarks/tables.py --cells benchmarks/comfyui_quality.json   # every cell of a file of comfyui_quality.py
    python benchmarks/tables.py --uses benchmarks/everyday.json           # every use of a file of everyday.py
    python benchmarks/tables.py --evidence benchmarks/evidence.json       # all tables of a file of evidence.py

A marked table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. Needs
neither ComfyUI nor torch.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
import trials

from benchmarks import everyday_rows, evidence_rows
from benchmarks.quality_rows import Row, cells, load, summary

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
DOCUMENTS = (HERE / "README.md", HERE.parent / "README.md", DOCS / "experiments.md", DOCS / "trust.md")
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)

STUDENTS = {  # and the solver that each is without a fit
    "amed": "dpm_2",
    "amed_euler": "euler",
    "amed_dpm_2": "dpm_2",
    "amed_ipndm": "ipndm-4",
    "amed_dpmpp_2m": "dpmpp-2",
    "amed_dpmpp_3m": "dpmpp-3",
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [" | ".join(map(str, row)).join(("| ", " |")) for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def read(name: str) -> Any:
    """What a JSON file of this folder holds."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def comfyui_quality() -> str:
    """Ours and everything in ComfyUI, in six lines."""
    return summary(load(HERE / "comfyui_quality_0.33.0.json"), load(HERE / "comfyui_quality.json"))


def pictures_quality() -> str:
    """The same on the text-to-picture model: a line for each scale of guidance and number of calls."""
    every = load(HERE / "pictures_quality.json")

    def line(cfg: float, calls: int) -> list[str]:
        some = [r for r in every if (r.cfg, r.calls) == (cfg, calls) and r.scheduler and not r.apart]
        stock = min((r for r in some if r.seed is None), key=lambda r: r.error)
        (ours,) = [r for r in some if r.sampler == "amed_multistep"]

        def shown(row: Row) -> str:
            return f"{row.error:.4f} ({row.low:.4f} to {row.high:.4f})"

        pair, ratio = f"{stock.sampler}, {stock.scheduler}", f"{ours.error / stock.error:.2f}"
        medians = f"{stock.median:.4f}, {ours.median:.4f}"
        return [f"{cfg:g}", str(calls), pair, shown(stock), shown(ours), ratio, medians]

    fitted = [(r.cfg, r.calls) for r in every if r.sampler == "amed_multistep"]
    head = ["cfg", "Calls", "Best stock pair", "Its error (95 %)", "`amed_multistep` (95 %)", "Ratio", "Medians"]
    return markdown(head, (line(*cell) for cell in sorted(fitted)))


def robustness() -> str:
    """For each model how many cells there are, how many are worse than without a fit, and the worst of every kind."""
    every = [cell | {"ratio": cell["error"] / cell["unlearned"]} for cell in read("robustness")]

    def highest(some: list[dict[str, Any]], key: str) -> str:
        values = sorted({cell[key] for cell in some})
        return ", ".join(f"{max(cell['ratio'] for cell in some if cell[key] == value):.2f}" for value in values)

    def line(model: str) -> list[object]:
        some = [cell for cell in every if cell["model"] == model]
        ratios = [cell["ratio"] for cell in some]
        counts = [len(some), sum(ratio > 1 for ratio in ratios), f"{statistics.median(ratios):.2f}"]
        return [model, *counts, *(highest(some, key) for key in ("cfg", "trajectories", "calls"))]

    scales, trajectories, calls = (
        ", ".join(f"{value:g}" for value in sorted({cell[key] for cell in every}))
        for key in ("cfg", "trajectories", "calls")
    )
    head = ["Model", "Cells", "Worse than no fit", "Median"]
    head += [f"Worst at cfg {scales}", f"from {trajectories} trajectories", f"in {calls} calls"]
    return markdown(head, (line(model) for model in dict.fromkeys(cell["model"] for cell in every)))


def model_matrix() -> str:
    """How many families of each prediction type pass, in every version that was measured."""
    versions = read("model_matrix")
    known = {name: row["predicts"] for rows in versions.values() for name, row in rows.items()}

    def passed(rows: dict[str, dict[str, str]], kind: str) -> str:
        outcomes = [outcome(row) for row in rows.values() if row["predicts"] == kind]
        return f"{outcomes.count('pass')} of {len(outcomes)}" if outcomes else "not in it"

    kinds = sorted(dict.fromkeys(known.values()), key=lambda kind: -list(known.values()).count(kind))
    lines = [[kind, *(passed(rows, kind) for rows in versions.values())] for kind in kinds]
    return markdown(["Predicts", *(f"Pass in {version}" for version in versions)], lines)


def outcome(row: dict[str, str]) -> str:
    """Whether all features pass, but for a bottleneck that is refused where there is none; else what happens."""
    others = {key: what for key, what in row.items() if key != "predicts" and not what.startswith("pass")}
    if "no U-Net bottleneck" in others.get("bottleneck", ""):
        del others["bottleneck"]
    return "; ".join(f"{features} {what}" for features, what in others.items()) or "pass"


def digits() -> str:
    """AMED and its plugins: the errors at 3, 5 and 7 calls, unlearned, published, and with what measured best."""
    every = read("digits")
    counts = sorted({row["calls"] for row in every if row["method"] == "amed"})

    def errors(belongs: Callable[[dict[str, Any]], bool]) -> str:
        return ", ".join(
            f"{min(row['error'] for row in every if row['calls'] == calls and belongs(row)):.4f}" for calls in counts
        )

    def unlearned(row: dict[str, Any]) -> bool:
        return row["fit_calls"] is None and row["error"] is not None and row["method"] != "teacher"

    def line(student: str, solver: str) -> list[str]:
        fits = [f"{student} published", student, f"{student} table"]
        found = [errors(lambda row, name=name: row["method"] == name) for name in fits]
        return [f"`{student}`", errors(lambda row: unlearned(row) and row["method"].split()[0] == solver), *found]

    head = ["Student", "Its solver, best grid and ending", "Published", "Network", "Table"]
    best = ["any", errors(unlearned), "", "", ""]
    return markdown(head, [*(line(*pair) for pair in STUDENTS.items()), best])


def everyday() -> str:
    """What the first pictures teach, by kind of use."""
    return everyday_rows.summary(everyday_rows.load(HERE / "everyday.json"))


def first_pictures() -> str:
    """What the first pictures teach: for each use and number of calls over models and scales of guidance."""
    every = read("first_pictures")

    def line(pictures: bool, use: str, calls: int) -> list[str]:
        own = [r for r in every if (r["model"] == "pictures", r["use"], r["calls"]) == (pictures, use, calls)]
        cells: dict[tuple[str, float], set[int]] = {(row["model"], row["cfg"]): set() for row in own}
        for row in own:
            cells[row["model"], row["cfg"]].add(row["pictures"])
        counts = sorted(set.intersection(*cells.values()))

        def shown(key: str, over: Callable[[list[float]], float]) -> str:
            return ", ".join(f"{over([row[key] for row in own if row['pictures'] == n]):.2f}" for n in counts)

        ratios = [shown("ratio", statistics.median), shown("ratio", max), shown("worst", max)]
        models = "text-to-picture" if pictures else "others"
        taught = ", ".join(map(str, counts))
        return [models, use, str(calls), str(len(cells)), taught, *ratios, shown("median_ratio", statistics.median)]

    keys = {(row["model"] == "pictures", row["use"], row["calls"]) for row in every}
    lines = sorted(keys, key=lambda key: (key[0], key[1] != "noise", key))
    head = ["Models", "Use", "Calls", "Cells", "Taught", "Ratio", "Worst cell", "Worst draw", "Median pictures"]
    return markdown(head, (line(*one) for one in lines))


def evidence(made: Callable[[Sequence[evidence_rows.Row]], str]) -> Callable[[], str]:
    """One of the tables of what can be seen on the text-to-picture model."""
    return lambda: made(evidence_rows.load(HERE / "evidence.json"))


def efforts() -> str:
    """What each effort errs by: medians over seeds, then over cells, and the worst of all fits."""
    every = read("efforts")
    lines = []
    for calls, effort in product(sorted({row["calls"] for row in every}), ("quick", "standard", "thorough")):
        own: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in every:
            if (row["calls"], row["effort"]) == (calls, effort):
                own.setdefault((row["model"], row["cfg"]), []).append(row)
        if own:
            rows = [row for found in own.values() for row in found]
            shown = [
                f"{statistics.median(statistics.median(r[key] for r in found) for found in own.values()):.2f}"
                for key in ("ratio", "median_ratio")
            ]
            seeds = max(len(found) for found in own.values())
            worst, most = max(row["ratio"] for row in rows), max(row["fit_calls"] for row in rows)
            lines.append([calls, effort, len(own), seeds, *shown, f"{worst:.2f}", f"{most:,}"])
    head = ["Calls", "Effort", "Cells", "Seeds", "Ratio", "Ratio of medians", "Worst fit", "Sample calls, at most"]
    return markdown(head, lines)


def eye() -> str:
    """What the eye sees, of fits with and without the two things that aim at it: means over scales and seeds."""
    every = read("eye")
    plain = {(row["cfg"], row["calls"], row["seed"]): row for row in every if row["method"] == "plain"}
    lines = []
    for calls, name in product(sorted({row["calls"] for row in every}), dict.fromkeys(row["method"] for row in every)):
        own = [row for row in every if (row["calls"], row["method"]) == (calls, name)]
        bases = [plain[row["cfg"], row["calls"], row["seed"]] for row in own]
        if own:
            errors = [
                f"{statistics.geometric_mean(row[key] / base[key] for row, base in zip(own, bases, strict=True)):.3f}"
                for key in ("decoded", "decoded_median", "latent")
            ]
            seen = [f"{statistics.fmean(r[key] for r in own):.3f}" for key in ("sharpness", "variety", "saturation")]
            farthest = max((row["sharpness"] for row in own), key=lambda value: abs(math.log(value)))
            lines.append([calls, name, len(own), *errors, *seen, f"{farthest:.3f}"])
    head = ["Calls", "Method", "Fits", "Decoded error", "its median", "Latent error", "Sharpness", "Variety"]
    return markdown([*head, "Saturation", "Sharpness, farthest"], lines)


def cfg_range() -> str:
    """What a range of cfg errs by at each scale, over a fit made there: geometric means of seeds, and the worst."""
    every = read("cfg_range")
    scales = sorted({row["cfg"] for row in every})

    def line(model: str) -> list[str]:
        of_scale = [[row["ratio"] for row in every if (row["model"], row["cfg"]) == (model, cfg)] for cfg in scales]
        own = [ratio for ratios in of_scale for ratio in ratios]
        means = [f"{statistics.geometric_mean(ratios):.2f}" for ratios in of_scale]
        return [model, *means, f"{statistics.median(own):.2f}", f"{max(own):.2f}"]

    head = ["Model", *(f"at cfg {cfg:g}" for cfg in scales), "Median", "Worst"]
    return markdown(head, (line(model) for model in dict.fromkeys(row["model"] for row in every)))


def passes() -> str:
    """Fits for a number of passes of the network, over those that ask the negative at every call."""

    def line(row: dict[str, Any]) -> list[object]:
        asks = ", ".join(str(k + 1) for k in row["saving_asks"])
        errors = [f"{row[name]:.4f}" for name in ("stock", "guided", "saving")]
        ratio, kept = f"{row['saving'] / row['guided']:.2f}", "yes" if row["error"] == row["saving"] else "no"
        called = [f"{row['saving_calls']}, {asks}", *errors, ratio, kept]
        return [row["model"], f"{row['cfg']:g}", row["passes"], *called]

    head = ["Model", "cfg", "Passes", "Calls, of which these ask the negative", "Best unlearned pair", "All calls ask"]
    return markdown([*head, "Some ask", "Ratio", "Kept"], map(line, read("passes")))


def sizes() -> str:
    """What fits err by at other sizes than their own, over fits made there: geometric means of seeds."""
    of_cell: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in read("sizes"):
        of_cell.setdefault((row["model"], row["cfg"], row["size"]), []).append(row)

    def line(model: str, cfg: float, size: str) -> list[str]:
        rows = of_cell[model, cfg, size]

        def mean(over: Callable[[dict[str, Any]], float]) -> str:
            return f"{statistics.geometric_mean(map(over, rows)):.2f}"

        own = mean(lambda row: row["own"] / row["stock"])
        usual, loss, median = (mean(itemgetter(key)) for key in ("ratio", "loss", "loss_median"))
        return [model, f"{cfg:g}", size, " x ".join(map(str, rows[0]["shape"])), usual, own, loss, median]

    head = ["Model", "cfg", "Times the size", "Shape", "Of the best unlearned, from the usual size", "Fitted there"]
    return markdown([*head, "Loss", "Loss of medians"], (line(*cell) for cell in of_cell))


def trust() -> str:
    """What was tried to break the pack, and how often that went well."""
    return trials.table(trials.Tried(**row | {"broken": tuple(row["broken"])}) for row in read("trust"))


TABLES: dict[str, Callable[[], str]] = {
    "comfyui_quality": comfyui_quality,
    "everyday": everyday,
    "evidence_goals": evidence(evidence_rows.goals),
    "evidence_prices": evidence(evidence_rows.prices),
    "evidence_cells": evidence(evidence_rows.cells),
    "evidence_looks": evidence(evidence_rows.beside),
    "evidence_calls": evidence(evidence_rows.equivalents),
    "efforts": efforts,
    "eye": eye,
    "cfg_range": cfg_range,
    "passes": passes,
    "sizes": sizes,
    "first_pictures": first_pictures,
    "pictures_quality": pictures_quality,
    "robustness": robustness,
    "model_matrix": model_matrix,
    "digits": digits,
    "trust": trust,
}


def written(text: str) -> str:
    """A document with every marked table as it has to be."""
    return MARKED.sub(lambda found: f"{found[1]}{found[2]}{TABLES[found[1]]()}\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a table differs")
    parser.add_argument("--cells", type=Path, nargs="+", help="only print every cell of these files")
    parser.add_argument("--uses", type=Path, nargs="+", help="only print every use of these files")
    parser.add_argument("--evidence", type=Path, help="only print all tables of this file")
    arguments = parser.parse_args()
    if arguments.cells:
        print(cells([row for file in arguments.cells for row in load(file)]))
        return
    if arguments.uses:
        print(everyday_rows.cells([row for file in arguments.uses for row in everyday_rows.load(file)]))
        return
    if arguments.evidence:
        print(evidence_rows.tables(evidence_rows.load(arguments.evidence)))
        return
    for file in DOCUMENTS:
        old = file.read_text(encoding="utf-8")
        new = written(old)
        if new != old and arguments.check:
            raise SystemExit(f"{file}: a table differs from its JSON file; run python benchmarks/tables.py")
        if new != old:
            file.write_text(new, encoding="utf-8", newline="\n")
            print(f"{file} rewritten")


if __name__ == "__main__":
    main()
