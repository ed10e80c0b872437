"""The table of what was tried to break this pack: for each promise how often, and how often it broke.

    python tests/trust.py                 # everything, in every ComfyUI found, some hours
    python tests/trust.py files states    # these promises
    python tests/trust.py --few           # as many tries as the suite makes
    python tests/trust.py --json FILE     # the table, and what broke, goes into this file, too

The suite runs the same tests, those that try much with fewer tries; its own number of tries is `--few`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "nodes")]
from comfyui import version_of
from trials import FULL, PROMISES
from versions import SUITES, TESTS, make_environment, places, run_quietly

Result = tuple[str, int, list[str]]  # a promise, tries, and what broke


def results(file: Path, where: str) -> Iterator[Result]:
    """What the tests of a run tried."""
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        noted = {one.get("name"): one.get("value") for one in case.iter("property")}
        if "promise" not in noted or case.find("skipped") is not None:
            continue
        broken = json.loads(noted.get("broken") or "[]")
        failed = case.find("failure") if case.find("error") is None else case.find("error")
        if failed is not None and not broken:
            broken = [str(failed.get("message"))[:300]]
        name = f"{where}, {case.get('name')}"
        yield str(noted["promise"]), int(noted.get("tried") or 1), [f"{name}: {one}" for one in broken]


def run(
    python: str, folders: Sequence[str], chosen: Sequence[str], environment: dict[str, str], where: str
) -> list[Result]:
    """Run the tests of these promises in folders of tests with an interpreter."""
    print(f"\n{where}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "results.xml"
        command = [python, "-m", "pytest", *folders, "-m", "trust", f"--junitxml={file}"]
        command += [argument for one in chosen for argument in ("--promise", one)]
        subprocess.run(command, env={**os.environ, **environment}, check=False)
        if not file.exists():
            return [(one, 1, [f"{where}: pytest did not run"]) for one in chosen]
        return list(results(file, where))


def table(rows: Sequence[Result]) -> tuple[str, bool]:
    """The table in Markdown, and whether nothing broke."""
    tried: dict[str, int] = defaultdict(int)
    broken: dict[str, list[str]] = defaultdict(list)
    for promise, count, what in rows:
        tried[promise] += count
        broken[promise] += what
    lines = ["| Promise | Tries | Broken |", "|---|---|---|"]
    lines += [f"| {PROMISES[one]} | {tried[one]:,} | {len(broken[one])} |" for one in PROMISES if one in tried]
    lines += [f"\n{one}" for every in broken.values() for one in every]
    return "\n".join(lines), not any(broken.values())


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, and print the table; 0 if nothing broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", choices=[[], *PROMISES], metavar="PROMISE", help=", ".join(PROMISES))
    parser.add_argument("--few", action="store_true", help="as many tries as the suite makes")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    asked = parser.parse_args(arguments)
    chosen = asked.promises or list(PROMISES)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), FULL: "" if asked.few else "1"}
    rows = run(sys.executable, [str(TESTS / "core")], chosen, environment, "core")
    for place in places(()):
        python = str(make_environment(place, run_quietly))
        version = version_of(place)
        rows += run(python, SUITES, chosen, {**environment, "COMFYUI_PATH": str(place)}, f"ComfyUI {version}")
    text, well = table(rows)
    print(f"\n{text}")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
