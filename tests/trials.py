"""The promises of `tests/trust.py`, and how its tests count what they tried.

A test that keeps a promise carries `@pytest.mark.trust("files")`, and counts as one try; one that tries much asks for
the fixture `trials`, counts each try, and says what broke. The suite tries a few of each; `tests/trust.py` tries all.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

FULL = "AMED_TRIALS"  # an environment variable: set, all is tried
PROMISES = {
    "scripts": "a predictor file runs no script in the browser",
    "files": "a mutated file gives one named error or a finite sample, in 5 s and 256 MB",
    "saving": "saving: nothing outside, clear text, no overwriting, atomic, no predictor lost to another process",
    "killed": "after kill -9 the same result; no foreign state",
    "states": "other settings begin anew; damaged, full disk, read-only folder: result not lost",
    "resumed": "stopped at any call, resumed, the same predictor",
    "training": "faults (out of memory, NaN, exceptions, Cancel) in training",
    "sampling": "the same in sampling; second run right; nothing left behind",
    "parity": "stock output bit-identical with the pack installed",
    "registration": "a failed import, a read-only folder, frozen lists harm nothing",
    "soak": "many samplings and trainings: memory, threads, files flat",
    "precision": "fp16, bf16, fp8 cast, odd sizes, batches, sigma lists",
    "threads": "two threads, a model each",
    "load": "prompts over HTTP with cancels and trainings; a killed server goes on",
    "supply": "no network, no pickle, no eval, no subprocess",
}
LONGEST = 300  # characters of what a broken try is told with


@dataclass
class Trials:
    """What a test tried, and what broke."""

    full: bool = field(default_factory=lambda: bool(os.environ.get(FULL)))
    tried: int = 0
    broken: list[str] = field(default_factory=list)

    def many(self, few: int, all_of_them: int) -> int:
        """How many to try: in the suite, and for the table."""
        return all_of_them if self.full else few

    def held(self, name: str, well: bool, why: str = "") -> None:
        """Count a try, which went well or broke the promise."""
        self.tried += 1
        if not well:
            self.broken.append(f"{name}: {why}"[:LONGEST])


@dataclass(frozen=True)
class Tried:
    """What came of a promise in one place: the core, or a version of ComfyUI."""

    promise: str
    where: str
    full: bool  # all tries, or as few as the suite makes
    tried: int
    broken: tuple[str, ...]
    commit: str
    date: str


def table(every: Iterable[Tried]) -> str:
    """In Markdown, a line for each promise: tries of the suite, tries in full, and how many of all broke it."""
    rows = list(every)
    lines = ["| Promise | Tries in the suite | Tries in full | Broken |", "|---|---|---|---|"]
    for promise, sentence in PROMISES.items():
        own = [one for one in rows if one.promise == promise]
        counts = [sum(one.tried for one in own if one.full is full) for full in (False, True)]
        few, full = (f"{count:,}" if count else "" for count in counts)
        if own:
            lines.append(f"| {sentence} | {few} | {full} | {sum(len(one.broken) for one in own)} |")
    return "\n".join(lines)
