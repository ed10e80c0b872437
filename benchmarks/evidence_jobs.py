"""All of evidence.py, in many processes side by side, for a machine of many cores or with a GPU.

    python benchmarks/evidence_jobs.py --jobs 11 --gpu-jobs 4 --json benchmarks/evidence.json --keep KEEP
    python benchmarks/evidence.py --json benchmarks/evidence.json --keep KEEP --kinds check   # compares what it left

Goes on where it stopped. Each process has a file of its own in the folder of what is kept, and all their rows go into
the one file as they are done. The teacher's samples come first, and what needs them waits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import evidence_rows as rows
from benchmarks.everyday_rows import Book

HERE = Path(__file__).parent
SCALES = (3.0, 6.0, 1.0)
CELLS = [(cfg, calls) for calls in (5, 3, 8) for cfg in SCALES] + [(1.0, 10), (1.0, 16)]
LADDER = ((3, 4, 5, 6, 8), (10, 12, 16), (20, 24))  # that are measured in one process each
DRAWS, PAUSE = 3, 0.2


@dataclass(frozen=True)
class Job:
    """A part of evidence.py."""

    name: str
    cfg: float
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()  # jobs that must be done
    gpu: bool = False  # whether it has many batches of model calls and little else

    def command(self, part: Path, keep: Path, fits: int) -> list[str]:
        """The process."""
        often = ["--fits", str(fits), "--draws", str(DRAWS), "--cfg", f"{self.cfg:g}"]
        return [sys.executable, str(HERE / "evidence.py"), "--json", str(part), "--keep", str(keep), *often,
                *self.arguments]  # fmt: skip


def jobs() -> Iterator[Job]:
    """All of them, in the order in which they begin where nothing is in their way."""

    def of(kind: str, cfg: float, calls: int, *efforts: str, gpu: bool = False) -> Job:
        name = " ".join([kind, f"{cfg:g}", str(calls), *efforts])
        more = ("--efforts", *efforts) if efforts else (rows.APART,) if kind == rows.USED else ()
        return Job(name, cfg, ("--calls", str(calls), "--kinds", kind, *more), (teacher(cfg),), gpu)

    def teacher(cfg: float) -> str:
        return f"{rows.CHECK} {cfg:g}"

    yield from (Job(teacher(cfg), cfg, ("--kinds", rows.CHECK), (), gpu=True) for cfg in SCALES)
    yield from (of(rows.STOCK, *cell, gpu=True) for cell in CELLS)
    yield from (of(rows.OURS, *cell, "thorough", gpu=True) for cell in CELLS)
    yield from (of(rows.PAPER, *cell, gpu=True) for cell in CELLS[:3])
    yield from (of(rows.OURS, *cell, "standard", "quick") for cell in CELLS)
    yield from (of(rows.USED, *cell) for cell in CELLS)
    for cfg in SCALES:
        after = tuple(f"{rows.STOCK} {cfg:g} {calls}" for scale, calls in CELLS if scale == cfg)
        for rungs in LADDER:
            calls = tuple(map(str, rungs))
            yield Job(f"{rows.LADDER} {cfg:g} {calls[0]}", cfg, ("--kinds", rows.LADDER, "--calls", *calls), after)
    yield from (of(rows.LEARNED, *cell) for cell in CELLS)


class Whole:
    """The file of all rows, and those of the jobs."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.file, self.folder = file, folder
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, job: Job) -> Path:
        """The file of a job's rows."""
        return self.folder / f"{job.name}.json"

    def begin(self, job: Job) -> None:
        """Give a job the rows that there are of its scale."""
        if self.file.exists():
            whole = json.loads(self.file.read_text(encoding="utf-8"))
            whole["rows"] = [row for row in whole["rows"] if row["cfg"] == job.cfg]
            self.part(job).write_text(json.dumps(whole), encoding="utf-8")

    def gather(self, job: Job) -> int:
        """Take over a job's new rows, and say how many there are."""
        if not self.part(job).exists():
            return 0
        about: dict[str, Any] = json.loads(self.part(job).read_text(encoding="utf-8"))["about"]
        whole, found = Book(self.file, about, rows.load), 0
        for row in rows.load(self.part(job)):
            if row.key not in whole:
                whole.add(row)
                found += 1
        return found


def run(todo: Sequence[Job], whole: Whole, how: argparse.Namespace) -> list[str]:
    """Run jobs until all are done or time is up; returns the names of those that are not done."""
    until, begun = time.monotonic() + 60 * how.minutes, time.monotonic()
    names, done, missed = {job.name for job in todo}, set[str](), list[str]()
    running: dict[subprocess.Popen[bytes], Job] = {}
    waiting = list(todo)

    def start(gpu: bool, most: int) -> None:
        """Begin what may begin, up to so many on the GPU or beside it."""
        free = most - sum(job.gpu == gpu or not how.gpu_jobs for job in running.values())
        ready = [job for job in waiting if (job.gpu == gpu or not how.gpu_jobs) and not names & set(job.after) - done]
        for job in ready[: max(free, 0)]:
            whole.begin(job)
            waiting.remove(job)
            environment = os.environ | ({"AMED_GPU": "1"} if gpu else {})
            with whole.part(job).with_suffix(".log").open("wb") as log:
                command = job.command(whole.part(job), how.keep, how.fits)
                running[subprocess.Popen(command, stdout=log, stderr=log, env=environment)] = job

    def end(process: subprocess.Popen[bytes]) -> None:
        """Take over what a process leaves."""
        job = running.pop(process)
        done.add(job.name)  # what needs it says so itself
        count = whole.gather(job)
        print(f"{time.monotonic() - begun:.0f} s: {job.name}: {count} rows, exit {process.returncode}", flush=True)
        if process.returncode:
            missed.append(job.name)
            lines = whole.part(job).with_suffix(".log").read_text(errors="replace").splitlines()
            print(*lines[-12:], sep="\n  ", flush=True)

    while (waiting or running) and time.monotonic() < until:
        start(gpu=False, most=how.jobs)
        if how.gpu_jobs:
            start(gpu=True, most=how.gpu_jobs)
        for process in [one for one in running if one.poll() is not None]:
            end(process)
        time.sleep(PAUSE)
    for process in list(running):
        process.terminate()
        process.wait()
        end(process)
    return [*missed, *(job.name for job in waiting)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the file of all rows")
    parser.add_argument("--keep", type=Path, required=True, help="the folder of what is dear to make again")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time on the CPU")
    parser.add_argument("--gpu-jobs", type=int, default=0, help="processes at a time on a GPU, beside them")
    parser.add_argument("--fits", type=int, default=3, help="of every effort")
    parser.add_argument("--minutes", type=float, default=24 * 60)
    parser.add_argument("--only", nargs="+", help="jobs whose names begin so")
    how = parser.parse_args(arguments)
    todo = [job for job in jobs() if not how.only or job.name.startswith(tuple(how.only))]
    left = run(todo, Whole(how.json, how.keep / "jobs"), how)
    print("not done:", ", ".join(left) if left else "none", flush=True)


if __name__ == "__main__":
    main()
