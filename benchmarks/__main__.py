"""`python -m benchmarks [operation ...]`: run benchmarks, print a table for each, write one result file."""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks import harness

# They are no operations.
APART = ("harness", "plots", "processor_time", "scoring_table", "smoke", "train_step")
OPERATIONS = sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py") if file.stem not in APART)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=harness.__doc__)
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of: {', '.join(OPERATIONS)}")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192])
    parser.add_argument("--dim", type=int, nargs="+", default=[768])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=["float32", "float64", "bfloat16", "float16"]
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=10, help="time for the rounds of one case")
    parser.add_argument(
        "--parts", nargs="+", choices=["rates", "ray", "page", "memory", "crops"], help="of scoring; all"
    )
    parser.add_argument("--models", nargs="+", help="of scoring's rates; three of full size")
    parser.add_argument("--photographs", help="of recipes: a folder of photographs of your own")
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out variants with one of these words in their names"
    )
    parser.add_argument("--skip", type=int, default=0, help="so many cases are in --out already")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"), help="result file (JSON)")
    arguments = parser.parse_args()
    for operation in arguments.operations:
        if operation not in OPERATIONS:
            parser.error(f"unknown operation {operation!r}; expected {', '.join(OPERATIONS)}")
    return arguments


def main() -> None:
    # A whole step, with arguments of its own.
    if sys.argv[1:2] == ["train_step"]:
        return importlib.import_module("benchmarks.train_step").main(sys.argv[2:])
    a = parse()
    results: list[dict] = json.loads(a.out.read_text())["results"] if a.skip else []
    machine, done = harness.machine(a.device), 0
    for operation in a.operations or OPERATIONS:
        module = importlib.import_module(f"benchmarks.{operation}")
        # It is no operation on rows, and has cases of its own.
        if hasattr(module, "results"):
            # They come all at once, or as they are made.
            for result in module.results(a):
                results.append(result)
                write(a, machine, results)
            continue
        for threads, dtype, rows, dim in itertools.product(a.threads, a.dtype, a.rows, a.dim):
            done += 1
            if done <= a.skip:
                continue
            # Optimizers and their gigabytes are cycles.
            gc.collect()
            torch.set_num_threads(threads)
            size = {"rows": rows, "dim": dim, "dtype": dtype, "device": a.device, "threads": threads}
            print(f"\n{operation} " + " ".join(f"{k}={v}" for k, v in size.items()), flush=True)
            case = module.case(rows, dim, getattr(torch, dtype), a.device)
            for name in [n for n in case.variants if any(word in n for word in a.without)]:
                del case.variants[name]
            try:
                result = size | harness.measure(case, a.device, a.seconds)
            except harness.Lost as lost:
                print(lost, flush=True)
                results.append(size | {"operation": case.operation, "variants": {}, "faults": lost.faults})
                write(a, machine, results)
                # A process that starts anew in the place of this one has a device for the later cases.
                rest = ["-m", "benchmarks", *sys.argv[1:], "--skip", str(done)]
                os.execv(sys.executable, [sys.executable, *rest])
            print(harness.table(result), flush=True)
            results.append(result)
            write(a, machine, results)
    print(f"\nwritten: {a.out}")
    faults = {(r["operation"], name) for r in results for name in r.get("faults", ())}
    if ours := sorted(f"{operation}: {name}" for operation, name in faults if name.startswith(harness.OURS)):
        sys.exit(f"wrong or failed: {', '.join(ours)}")


def write(arguments: argparse.Namespace, machine: dict, results: list[dict]) -> None:
    """After every case, so that a run that is stopped leaves what it has measured."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "results": results}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
