"""Writes what `python -m benchmarks scoring` measured into README.md and docs/using.md.

python -m benchmarks scoring --threads 1 2 --out benchmarks/results/cpu_scoring.json
python -m benchmarks.scoring_table
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scoring import BEFORE, CEILING, INPUT, OURS, PLAIN

ROOT = Path(__file__).parents[1]
RESULT = Path("benchmarks/results/cpu_scoring.json")
NAMES = {"ViT-B-32": "ViT-B/32", "ViT-B-16-SigLIP2": "SigLIP 2 B/16", "ViT-L-14": "ViT-L/14"}
DAY = 86_400
# The lines between these are written by this file.
BEGIN, END = "<!-- written by python -m benchmarks.scoring_table -->", "<!-- end of what is written -->"


def best(rows: list[dict]) -> dict[str, dict]:
    """By model, its row with the most images per second."""
    found: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: row["images_per_second"][OURS]):
        found[row["model"]] = row
    return {name: found[name] for name in NAMES if name in found}


def short(number: float) -> str:
    """Two figures at least, without those that no measurement has: 2.4 million, 610,000, 31, 1.3."""
    if number >= 1e6:
        return f"{number / 1e6:.2g} million"
    if number >= 100:
        digits = len(str(int(number))) - 2
        return f"{round(number, -digits):,.0f}"
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def readme(content: dict[str, Any]) -> str:
    """The row of README's table, of the model that is first among NAMES; "" of a machine with other work."""
    machine = content["machine"]
    if machine["load_average"][0] >= machine["cpus"]:
        return ""
    name, row = next(iter(best(rates(content)).items()))
    rate = row["images_per_second"][OURS]
    return (
        f"| scoring JPEG files, {NAMES[name]} | {short(rate)} images/s, {short(rate * DAY)} a day "
        f"| one by one in fp32 {row['of_before']:.1f}x |\n"
    )


def using(content: dict[str, Any]) -> str:
    """The table of docs/using.md and what is said of it."""
    machine, found = content["machine"], rates(content)
    side = found[0]["side"]
    lines = [
        f"Measured on {machine['cpus']} cores of an {machine['cpu']}, PyTorch {machine['torch']}, load "
        f"{machine['load_average'][0]:.1f} at the start: from JPEG files of {side} x {side} pixels to a "
        "table, in images per second (medians of rounds in turn, random weights; "
        f"[results](../{RESULT})):",
        "",
        "| | threads | batch | ours | one at a time, fp32 | plain loop, bf16 | model alone | images alone "
        "| ours of the possible |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        shown = " | ".join(
            short(row["images_per_second"][way]) for way in (OURS, BEFORE, PLAIN, CEILING, INPUT)
        )
        lines.append(
            f"| {NAMES[row['model']]} | {row['threads']} | {row['batch']}, {row['precision']} | {shown} "
            f"| {row['of_bound']:.0%} |"
        )
    lines += [
        "",
        "What is possible is the slowest of the model alone, the images alone, and all cores at both. "
        "One such machine, all day:",
        "",
        "| | images a day | a billion images | machines for a billion in 30 days |",
        "|---|---|---|---|",
    ]
    for name, row in best(found).items():
        day = row["images_per_second"][OURS] * DAY
        lines.append(
            f"| {NAMES[name]} | {short(day)} | {short(1e9 / day)} machine-days | {short(1e9 / day / 30)} |"
        )
    moved, flipped, compared = (
        max(row["largest_change"] for row in found),
        sum(row["flipped"] for row in found),
        sum(row["compared"] for row in found),
    )
    lines += [
        "",
        f"The billion is on paper: nobody has scored it. At this precision a probability is at most "
        f"{moved:.1e} from fp32's, and {flipped} of {compared} decisions at 0.5 are others.",
        *(say(row) for part, say in SAID.items() for row in content["results"] if row["part"] == part),
    ]
    return "\n".join(lines)


def rates(content: dict[str, Any]) -> list[dict]:
    return [row for row in content["results"] if row["part"] == "rates"]


SAID: dict[str, Callable[[dict], str]] = {
    "ray": lambda row: (
        f"On Ray with two workers of one thread each, {NAMES[row['model']]} scores "
        f"{short(row['images_per_second']['ray'])} images a second, {row['of_local']:.2f} of what the "
        f"command does with one thread without it; Ray starts in {row['start_s']:.0f} s."
    ),
    "page": lambda row: (
        f"The page gives {row['clients']} clients who ask at the same time {short(row['images_per_second'])} "
        f"answers a second, each after {short(row['median_ms'])} ms; one alone waits for "
        f"{short(row['alone_ms'])} ms."
    ),
    "memory": lambda row: (
        f"Over {row['images']:,} images the memory of the process that scores changes by "
        f"{row['own_mib_per_1000']:+.2f} MiB per 1000 images, that of all processes by "
        f"{row['all_mib_per_1000']:+.2f}."
    ),
}


def between(text: str, written: str) -> str:
    """The text with this between its two marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"there is nothing between {BEGIN} and {END} to write to")
    return f"{head}{BEGIN}\n\n{written}\n\n{END}{tail}"


def main() -> None:
    content = json.loads((ROOT / RESULT).read_text())
    page = ROOT / "docs" / "using.md"
    page.write_text(between(page.read_text(), using(content)))
    front = ROOT / "README.md"
    text = re.sub(r"^\| scoring JPEG .*\n", "", front.read_text(), flags=re.MULTILINE)
    # After the last row of the table of what was measured.
    last = list(re.finditer(r"^\| DGS-Net training step.*\n", text, flags=re.MULTILINE))[-1].end()
    front.write_text(text[:last] + readme(content) + text[last:])


if __name__ == "__main__":
    main()
