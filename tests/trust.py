"""The table of what was tried to break this pack: for each promise how often, and how often it broke.

    python tests/trust.py                 # everything, in every ComfyUI found, some hours
    python tests/trust.py files states    # these promises
    python tests/trust.py --few           # as many tries as the suite makes
    python tests/trust.py --json FILE     # the figures go into this file, in place of older ones of their kind

The suite runs the same tests, those that try much with fewer tries; its own number of tries is `--few`.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "nodes")]
from comfyui import version_of
from trials import FULL, LONGEST, PROMISES, Tried, table
from versions import SUITES, TESTS, make_environment, places, run_quietly

CORE = "core"


def results(file: Path, promises: Sequence[str], where: str, full: bool) -> Iterator[Tried]:
    """What the tests of a run tried, for each promise that has any."""
    tried: dict[str, int] = defaultdict(int)
    broken: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        noted = {one.get("name"): one.get("value") for one in case.iter("property")}
        promise = noted.get("promise")
        if promise is None or case.find("skipped") is not None:
            continue
        what = json.loads(noted.get("broken") or "[]")
        failed = case.find("failure") if case.find("error") is None else case.find("error")
        if failed is not None and not what:
            what = [str(failed.get("message"))[:LONGEST]]
        tried[promise] += int(noted.get("tried") or 1)
        broken[promise] += [f"{where}, {case.get('name')}: {one}" for one in what]
    git = ["git", "-C", str(TESTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    today = datetime.date.today().isoformat()
    for promise in promises:
        if tried[promise]:
            yield Tried(promise, where, full, tried[promise], tuple(broken[promise]), commit, today)


def run(python: str, where: str, folders: Sequence[str], chosen: Sequence[str], full: bool, **more: str) -> list[Tried]:
    """Run the tests of these promises in folders of tests with an interpreter."""
    print(f"\n{where}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "results.xml"
        command = [python, "-m", "pytest", *folders, "-m", "trust", f"--junitxml={file}"]
        command += [argument for one in chosen for argument in ("--promise", one)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, FULL: "1" if full else "", **more}
        subprocess.run(command, env=environment, check=False)
        if not file.exists():
            raise SystemExit(f"{where}: pytest did not run")
        return list(results(file, chosen, where, full))


def kept(file: Path, more: Sequence[Tried]) -> list[Tried]:
    """What a file has and what comes to it, which takes the place of what is of the same kind."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    every = [*(Tried(**one | {"broken": tuple(one["broken"])}) for one in old), *more]
    newest = {(one.promise, one.where, one.full): one for one in every}
    rows = [newest[key] for key in sorted(newest)]
    lines = ",\n".join(json.dumps(asdict(one)) for one in rows)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return rows


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, and print the table; 0 if nothing broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", choices=[[], *PROMISES], metavar="PROMISE", help=", ".join(PROMISES))
    parser.add_argument("--few", action="store_true", help="as many tries as the suite makes")
    parser.add_argument("--only", nargs="+", metavar="WHERE", help=f"{CORE}, or versions of ComfyUI: only there")
    parser.add_argument("--json", type=Path, help="a file of figures")
    asked = parser.parse_args(arguments)
    chosen = asked.promises or list(PROMISES)
    full, rows = not asked.few, list[Tried]()
    if not asked.only or CORE in asked.only:
        rows += run(sys.executable, CORE, [str(TESTS / CORE)], chosen, full)
    for place in places(()):
        version = version_of(place)
        if not asked.only or version in asked.only:
            python = str(make_environment(place, run_quietly))
            rows += run(python, version, SUITES, chosen, full, COMFYUI_PATH=str(place))
    if asked.json:
        kept(asked.json, rows)
    broken = [what for one in rows for what in one.broken]
    print("", table(rows), *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
