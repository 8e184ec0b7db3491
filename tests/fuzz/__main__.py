"""Change good files at random, and read them: nothing but an answer or one line may come of it.

    python -m tests.fuzz [--seconds 60 | --mutations N] [--seed N] [--only WORD ...] [--found build/fuzz]

Each file that breaks this is kept, and its line names it. Put a small one into tests/fuzz/found, under the
same name: every run begins with those.
"""

from __future__ import annotations

import argparse
import logging
import random
import secrets
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from dgsnet.data.images import ImageError
from dgsnet.errors import UserError

from tests.fuzz.target import Target
from tests.fuzz.targets import targets
from tests.support.cost import Cost, cost, resident

FOUND = Path(__file__).parent / "found"
# Bytes that this process may take more for one file, and have more after all files of a kind.
MOST_MEMORY = 200_000_000
# A refusal has fewer letters than this.
LONGEST = 2000


@dataclass
class Tally:
    """How many files of a kind were read and refused, and the most that one of them cost."""

    files: int = 0
    refused: int = 0
    most: Cost = field(default_factory=Cost)

    def add(self, refused: bool, taken: Cost) -> None:
        self.files += 1
        self.refused += refused
        self.most = Cost(max(self.most.seconds, taken.seconds), max(self.most.memory, taken.memory))


def problem(target: Target, data: bytes) -> tuple[str, bool, Cost]:
    """What is wrong with how a file is read, "" if nothing is; whether it was refused; and what it cost."""
    refusal = None
    try:
        with cost() as taken:
            target.read(data)
        if taken.seconds > target.seconds:
            # The first time may have included an import.
            with cost() as taken:
                target.read(data)
    except (UserError, ImageError) as error:
        refusal = str(error)
    except OSError as error:
        # The system refuses a name, which may be long.
        refusal = error.strerror or str(error)
    except Exception as error:
        wrong = "".join(traceback.format_exception_only(error)).strip() + f" ({place(error)})"
        return wrong, False, taken
    wrong, refused = "", refusal is not None
    if refusal is not None and ("\n" in refusal or not 0 < len(refusal) < LONGEST):
        wrong = f"refused in {len(refusal)} letters and {refusal.count(chr(10)) + 1} lines"
    elif taken.seconds > target.seconds:
        wrong = f"{taken.seconds:.1f} seconds"
    elif taken.memory > MOST_MEMORY:
        wrong = f"{taken.memory / 1e6:.0f} MB"
    return wrong, refused, taken


def place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def fuzz(
    chosen: list[Target], seconds: float, seed: int, found: Path, *, mutations: int | None = None
) -> tuple[dict[str, Tally], list[str]]:
    """Read changed files of each target in turn, the same number of seconds of each, or of files if given.

    Returns:
        What was read by target, and a line for each problem.
    """
    tallies: dict[str, Tally] = {}
    problems = []
    for target in chosen:
        for good in target.seeds:
            target.read(good)
        rng, before = random.Random(f"{seed} {target.name}"), resident()
        tally = tallies[target.name] = Tally()
        old = sorted(FOUND.glob(f"{target.name.replace(' ', '_')}-*"))
        for path in old:
            if wrong := problem(target, path.read_bytes())[0]:
                problems.append(f"{target.name}: {wrong}; {path}")
        most, end = mutations and -(-mutations // len(chosen)), time.monotonic() + seconds / len(chosen)
        while tally.files < most if most else time.monotonic() < end:
            data = target.change(rng.choice(target.seeds), rng)
            wrong, refused, taken = problem(target, data)
            tally.add(refused, taken)
            if wrong:
                found.mkdir(parents=True, exist_ok=True)
                path = found / f"{target.name.replace(' ', '_')}-{tally.files}"
                path.write_bytes(data)
                problems.append(f"{target.name}: {wrong}; {path}")
        if (more := resident() - before) > MOST_MEMORY:
            problems.append(f"{target.name}: {more / 1e6:.0f} MB more memory")
    return tallies, problems


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--seconds", type=float, default=60)
    long.add_argument("--mutations", type=int, help="files to change, of all kinds together")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--only", nargs="+", default=[""], help="targets whose name has one of these words")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    # The page would log a line about each bad request.
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, targets(Path(folder)) as every:
        chosen = [target for target in every if any(word in target.name for word in given.only)]
        print(f"seed {given.seed}", flush=True)
        tallies, problems = fuzz(chosen, given.seconds, given.seed, given.found, mutations=given.mutations)
    for name, tally in tallies.items():
        most = f"{tally.most.seconds:.2f} s and {tally.most.memory / 1e6:.0f} MB more"
        print(f"{name:22}{tally.files:8} files, {tally.refused} refused, at most {most}")
    for line in problems:
        print(line)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
