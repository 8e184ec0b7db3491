"""`python -m benchmarks.plots FOLDER --results FILE...`: a table of all results, and plots for each device.

One shows the share of `torch.clone`'s bandwidth at equal bytes that every variant reached, another that
share and the time against the number of rows, for operations measured at three sizes or more. What `prior`
measures is plotted against steps, what `update` measures against arrivals, what `recipes` measures as
differences. Other results that are not of operations on tensors (a training step, the data path) have tables
of their own and are left out.

The detector's packages are imported for these three alone: a machine for kernels need not have them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness import CLONE, COPY

# Okabe and Ito's colours, distinct also to colour-blind eyes; ours come first.
COLOURS = (
    *("#0072B2", "#56B4E9", "#009E73", "#999999", "#E69F00", "#D55E00", "#CC79A7", "#F0E442"),
    # Tol's follow, where there are more variants.
    *("#882255", "#44AA99", "#332288", "#AA9944"),
)


def label(result: dict) -> str:
    threads = f", {result['threads']} threads" if result["device"] == "cpu" else ""
    return f"{result['operation']} {result['rows']} x {result['dim']} {result['dtype']}{threads}"


def table(results: list[dict]) -> str:
    """A Markdown table: every case and variant with its time, bandwidth and ratios."""
    lines = [
        "| case | variant | median ms | p10 to p90 | host ms | GB/s | share of clone | x eager |",
        "|---" * 8 + "|",
    ]
    for result in results:
        for name, v in result["variants"].items():
            cells = (
                label(result),
                name,
                f"{v['median_ms']:.3f}",
                f"{v['p10_ms']:.3f} to {v['p90_ms']:.3f}",
                f"{v['host_ms']:.3f}" if "host_ms" in v else "",
                f"{v['gb_per_s']:.1f}",
                f"{v['bandwidth_over_clone']:.2f}",
                f"{v['speed_over_eager']:.1f}" if "speed_over_eager" in v else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
        for name, fault in result.get("faults", {}).items():
            lines.append(f"| {label(result)} | {name} | {fault} |" + " |" * 5)
    return "\n".join(lines)


def plot(results: list[dict], title: str, path: Path) -> None:
    shown = [[n for n in r["variants"] if n not in (CLONE, COPY)] for r in results]
    names = list(dict.fromkeys(n for variants in shown for n in variants))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    bars = sum(len(variants) + 1 for variants in shown)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.18 * bars), layout="constrained")
    place, ticks = 0, []
    for result, variants in zip(results, shown):
        ticks.append(place + (len(variants) - 1) / 2)
        for name in variants:
            v = result["variants"][name]
            drawn = axes.barh(place, v["bandwidth_over_clone"], 0.9, color=colours[name])
            axes.bar_label(drawn, [f"{v['median_ms']:.3g} ms"], padding=3, fontsize=7)
            place += 1
        place += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, [label(r) for r in results], fontsize=8)
    axes.set_ylim(place - 1.5, -1)
    axes.set_xlabel("bandwidth, as a share of torch.clone at equal bytes")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colours[n]) for n in names],
        names,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def by_size(results: list[dict]) -> dict[str, list[dict]]:
    """Results that differ in the number of rows alone, three or more, by what they have in common."""
    families: dict[str, dict[int, dict]] = {}
    for result in results:
        families.setdefault(label(result | {"rows": "rows"}), {})[result["rows"]] = result
    return {name: [f[rows] for rows in sorted(f)] for name, f in families.items() if len(f) >= 3}


def plot_sizes(families: dict[str, list[dict]], title: str, path: Path) -> None:
    names = list(dict.fromkeys(n for f in families.values() for r in f for n in r["variants"] if n != COPY))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    figure, grid = plt.subplots(
        2, len(families), figsize=(4.6 * len(families), 7.2), layout="constrained", squeeze=False
    )
    shown = {"bandwidth_over_clone": "share of clone", "median_ms": "median ms"}
    for (name, family), column in zip(families.items(), grid.T):
        for axes, (figured, words) in zip(column, shown.items()):
            for variant in names:
                points = [
                    (r["rows"], r["variants"][variant][figured]) for r in family if variant in r["variants"]
                ]
                if points:
                    style = {"linestyle": "--", "color": "black"} if variant == CLONE else {}
                    style = {"color": colours[variant]} | style
                    axes.plot(*zip(*points), marker="o", markersize=3, label=variant, **style)
            axes.set(xscale="log", xlabel="rows", ylabel=words)
            axes.spines[["top", "right"]].set_visible(False)
        column[1].set_yscale("log")
        column[0].set_title(name, fontsize=9, loc="left")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_prior(results: list[dict], title: str, path: Path) -> None:
    """What is left of CLIP against steps: a row per measure, a column per setting, means and every seed."""
    settings = list(dict.fromkeys((r["lr"], r["dropout"]) for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    shown = {"zero_shot": "zero-shot accuracy", "cka": "CKA to the frozen features", "drift": "drift"}
    figure, grid = plt.subplots(
        len(shown), len(settings), figsize=(3.2 * len(settings), 8), layout="constrained", sharey="row"
    )
    for axes, words in zip(grid[:, 0], shown.values()):
        axes.set_ylabel(words)
    for (rate, dropout), column in zip(settings, grid.T):
        column[0].set_title(f"learning rate {rate:g}, dropout {dropout:g}", fontsize=9, loc="left")
        for axes, measure in zip(column, shown):
            for method, colour in zip(methods, COLOURS):
                key = (method, rate, dropout)
                runs = [r for r in results if (r["method"], r["lr"], r["dropout"]) == key]
                for run in runs:
                    axes.plot(run["steps"], run[measure], color=colour, linewidth=0.8, alpha=0.35)
                mean = [sum(values) / len(runs) for values in zip(*(run[measure] for run in runs))]
                axes.plot(runs[0]["steps"], mean, color=colour, marker="o", markersize=3, label=method)
            axes.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel("step")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_update(results: list[dict], title: str, path: Path) -> None:
    """Old, new and all decoders after every arrival, by rule: means over seeds with standard errors."""
    from benchmarks import update

    rules = list(dict.fromkeys(r["rule"] for r in results))
    arrivals = list(dict.fromkeys(r["arrived"] for r in results if r["arrived"]))
    measures = {"auc": "AUC", "accuracy": "accuracy at 0.5"}
    figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained", sharey="row")
    for (measure, words), row in zip(measures.items(), grid):
        row[0].set_ylabel(words)
        for group, axes in zip(update.GROUPS, row):
            axes.set_title(group, fontsize=9, loc="left")
            for number, (rule, colour) in enumerate(zip(rules, COLOURS)):
                found = [
                    [update.summary(r, measure)[group] for r in results if (r["rule"], r["arrived"]) == key]
                    for key in ((rule, arrival) for arrival in arrivals)
                ]
                means = [statistics.mean(values) for values in found]
                errors = [statistics.stdev(values) / len(values) ** 0.5 for values in found]
                places = [place + (number - 1.5) / 12 for place in range(len(arrivals))]
                axes.errorbar(places, means, errors, color=colour, marker="o", markersize=3, label=rule)
            axes.set_xticks(range(len(arrivals)), arrivals, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rules))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_recipes(results: list[dict], title: str, path: Path) -> None:
    """What each recipe has more than the plain one: means over seeds with standard errors, a panel a test."""
    from benchmarks import recipes

    columns = recipes.columns(results)
    shown = [recipe for recipe in recipes.RECIPES if recipe != recipes.BASE]
    figure, grid = plt.subplots(
        1, len(columns), figsize=(2 + 1.9 * len(columns), 0.6 + 0.32 * len(shown)), layout="constrained"
    )
    for axes, (name, column) in zip(grid, columns.items()):
        base = recipes.values(results, recipes.BASE, *column)
        for place, recipe in enumerate(shown):
            found = recipes.values(results, recipe, *column) - base
            error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else None
            colour = COLOURS[recipes.DATA.index(recipe.data)]
            axes.barh(place, found.mean(), 0.7, xerr=error, color=colour, ecolor="black", capsize=2)
        axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(
            range(len(shown)), map(str, shown) if axes is grid[0] else [""] * len(shown), fontsize=8
        )
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_title(f"{name}\n{base.mean():.1f}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"AUC in percent: points above or below {recipes.BASE}, whose own stands on top", fontsize=9
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the plots go")
    parser.add_argument(
        "--results", type=Path, nargs="+", required=True, help="files of python -m benchmarks"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    by_device: dict[str, list[dict]] = {}
    for file in arguments.results:
        content = json.loads(file.read_text())
        machine = content["machine"]
        device = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}"
        of_operations = [result for result in content.get("results", []) if "bytes_moved" in result]
        by_device.setdefault(device, []).extend(of_operations)
        prior = [result for result in content.get("results", []) if result.get("benchmark") == "prior"]
        if prior:
            plot_prior(prior, device, arguments.folder / f"{prior[0]['device']}_prior.png")
        updates = [r for r in content.get("results", []) if r.get("benchmark") == "update"]
        if updates:
            plot_update(updates, device, arguments.folder / f"{updates[0]['device']}_update.png")
        recipes = [r for r in content.get("results", []) if r.get("benchmark") == "recipes"]
        if recipes:
            plot_recipes(recipes, device, arguments.folder / f"{recipes[0]['device']}_recipes.png")
    for device, results in by_device.items():
        if not results:
            continue
        kind = results[0]["device"]
        # A file for each card.
        if kind != "cpu":
            kind = "_".join(re.findall(r"\w+", device.split(",")[0])).lower()
        families = by_size(results)
        if families:
            plot_sizes(families, device, arguments.folder / f"{kind}_sizes.png")
        in_families = [r for family in families.values() for r in family if r is not family[-1]]
        plot([r for r in results if r not in in_families], device, arguments.folder / f"{kind}.png")
        print(f"{device}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
