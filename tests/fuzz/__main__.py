"""Change good files at random, and read them: nothing but an answer or one line may come of it.

    python -m tests.fuzz [--seconds 60] [--seed N] [--only WORD] [--found build/fuzz]

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
from collections import Counter
from pathlib import Path

import psutil
from dgsnet.data.images import ImageError
from dgsnet.errors import UserError

from tests.fuzz.target import Target
from tests.fuzz.targets import targets

FOUND = Path(__file__).parent / "found"
MOST_MEMORY = 300 * 2**20  # bytes that this process may grow by while it reads files of one kind
LONGEST = 2000  # letters of a line


def problem(target: Target, data: bytes) -> tuple[str, bool]:
    """What is wrong with how a file is read, "" if nothing is; and whether it was refused."""
    began = time.process_time()
    try:
        target.read(data)
        if time.process_time() - began > target.seconds:  # once more: it may have been an import
            began = time.process_time()
            target.read(data)
        refusal = None
    except (UserError, ImageError) as error:
        refusal = str(error)
    except OSError as error:  # the system refuses a name, which may be long
        refusal = error.strerror or str(error)
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip() + f" ({place(error)})", False
    if refusal is not None and ("\n" in refusal or not 0 < len(refusal) < LONGEST):
        return f"refused in {len(refusal)} letters and {refusal.count(chr(10)) + 1} lines", True
    if (took := time.process_time() - began) > target.seconds:
        return f"{took:.1f} seconds", refusal is not None
    return "", refusal is not None


def place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def fuzz(chosen: list[Target], seconds: float, seed: int, found: Path) -> tuple[Counter[str], list[str]]:
    """Read changed files of each target in turn, the same number of seconds of each.

    Returns:
        How many were read and refused, by target and "TARGET, refused", and a line for each problem.
    """
    counts: Counter[str] = Counter()
    problems = []
    for target in chosen:
        for good in target.seeds:
            target.read(good)
        rng, before = random.Random(f"{seed} {target.name}"), memory()
        old = sorted(FOUND.glob(f"{target.name.replace(' ', '_')}-*"))
        for path in old:
            if wrong := problem(target, path.read_bytes())[0]:
                problems.append(f"{target.name}: {wrong}; {path}")
        end = time.monotonic() + seconds / len(chosen)
        while time.monotonic() < end:
            data = target.change(rng.choice(target.seeds), rng)
            wrong, refused = problem(target, data)
            counts[target.name] += 1
            counts[f"{target.name}, refused"] += refused
            if wrong:
                found.mkdir(parents=True, exist_ok=True)
                path = found / f"{target.name.replace(' ', '_')}-{counts[target.name]}"
                path.write_bytes(data)
                problems.append(f"{target.name}: {wrong}; {path}")
        if (more := memory() - before) > MOST_MEMORY:
            problems.append(f"{target.name}: {more / 2**20:.0f} MiB more memory")
    return counts, problems


def memory() -> int:
    return psutil.Process().memory_info().rss


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--only", default="", help="targets whose name has this word")
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # the page's lines about each bad request
    with tempfile.TemporaryDirectory() as folder, targets(Path(folder)) as every:
        chosen = [target for target in every if given.only in target.name]
        print(f"seed {given.seed}, {given.seconds:g} seconds", flush=True)
        counts, problems = fuzz(chosen, given.seconds, given.seed, given.found)
    for target in chosen:
        print(f"{target.name:22}{counts[target.name]:8} files, {counts[f'{target.name}, refused']} refused")
    for line in problems:
        print(line)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
