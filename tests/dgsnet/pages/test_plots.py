"""What the pictures show: the order of their rows, whose value each mark is, and what is named."""

import re

import numpy as np
import pytest
from dgsnet.pages import plots
from matplotlib.colors import to_hex

VALUES = {
    "middle": {"accuracy": 0.7, "real_accuracy": 0.6, "generated_accuracy": 0.8, "ap": 0.75},
    "best": {"accuracy": 0.9, "real_accuracy": 0.95, "generated_accuracy": 0.85, "ap": 0.99},
    "none": {"accuracy": np.nan, "real_accuracy": np.nan, "generated_accuracy": np.nan, "ap": np.nan},
    "worst": {"accuracy": 0.4, "real_accuracy": 0.1, "generated_accuracy": 0.5, "ap": 0.3},
}
MEAN = {"accuracy": 0.67, "real_accuracy": 0.55, "generated_accuracy": 0.72, "ap": 0.68}


def words(texts):
    return [text.get_text() for text in texts]


def test_generators_from_the_best_to_the_worst_and_the_mean_last():
    intervals = {name: dict.fromkeys(("real_accuracy", "generated_accuracy"), (0.2, 0.3)) for name in VALUES}
    figure = plots.generators(VALUES, MEAN, 0.35, intervals)
    (axes,) = figure.axes
    names = ["best", "middle", "worst", "none", "mean"]
    assert words(axes.get_yticklabels()) == names
    # The first generator is on top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    rows = [*(VALUES[name] for name in names[:-1]), MEAN]
    for bars, key in zip(axes.containers, ("real_accuracy", "generated_accuracy")):
        np.testing.assert_allclose([bar.get_width() for bar in bars], [100 * row[key] for row in rows])
    points = next(line for line in axes.lines if line.get_label() == "AP")
    np.testing.assert_allclose(points.get_xdata(), [100 * row["ap"] for row in rows])
    whiskers = [line for line in axes.lines if list(line.get_xdata()) == [20, 30]]
    assert len(whiskers) == 8
    assert words(figure.legends[0].get_texts()) == ["AP", "accuracy on real", "accuracy on generated"]
    assert axes.get_xlabel() == "percent, at threshold 0.35"


@pytest.mark.parametrize("count", [3, 7])
def test_the_lowest_curves_are_named(count):
    names = [f"g{i}" for i in range(count)]
    auc = {name: 0.9 - 0.1 * i for i, name in enumerate(names)}
    curves = {name: (np.array([0, 0.1, 1]), np.array([0, auc[name], 1])) for name in names}
    figure = plots.roc_curves(curves, auc)
    named = names[-5:]
    legend = figure.legends[0]
    assert words(legend.get_texts()) == [f"{n}  {100 * auc[n]:.1f}" for n in reversed(named)]
    assert legend.get_title().get_text() == ("AUC" if count <= 5 else "lowest AUC")
    drawn = {line.get_label(): line.get_ydata()[1] for line in figure.axes[0].lines[:count]}
    for name in named:
        assert drawn[f"{name}  {100 * auc[name]:.1f}"] == pytest.approx(100 * auc[name])


def test_distortions_beside_the_undistorted():
    panels = {
        "AUC": {"none": (0.9, 0.8, 0.95), "jpeg:50": (0.6, 0.5, 0.7)},
        "accuracy": {"none": (0.8, 0.7, 0.9), "jpeg:50": (0.4, 0.3, 0.55)},
    }
    figure = plots.robustness(panels)
    for axes, (title, rows) in zip(figure.axes, panels.items()):
        undistorted, values = axes.lines
        assert axes.get_title(loc="left") == title
        assert list(undistorted.get_xdata()) == [100 * rows["none"][0]] * 2
        np.testing.assert_allclose(values.get_xdata(), [100 * row[0] for row in rows.values()])
        (spans,) = axes.collections
        found = [segment[:, 0] for segment in spans.get_segments()]
        np.testing.assert_allclose(found, [[100 * low, 100 * high] for _, low, high in rows.values()])
    assert words(figure.axes[0].get_yticklabels()) == ["none", "jpeg:50"]


def test_scores_by_class_thresholds_and_reliability():
    labels, probabilities = np.array([0, 0, 0, 1]), np.array([0.11, 0.11, 0.91, 0.93])
    bins = {"count": np.array([2, 0, 2]), "probability": np.array([0.11, np.nan, 0.92])}
    bins["generated"] = np.array([0.0, np.nan, 0.5])
    left, right = plots.calibration(labels, probabilities, bins, {"0.5": 0.5, "calibrated": 0.8}).axes
    assert words(left.get_legend().get_texts()) == [
        "real", "generated", "threshold 0.5", "threshold calibrated",
    ]  # fmt: skip
    assert [line.get_xdata()[0] for line in left.lines] == [0.5, 0.8]
    real, generated = ([bar.get_height() for bar in bars] for bars in left.containers)
    assert (real[5], real[45], generated[46]) == pytest.approx((200 / 3, 100 / 3, 100))
    np.testing.assert_array_equal(right.collections[0].get_offsets().data[[0, 2]], [[0.11, 0], [0.92, 0.5]])


def test_what_is_above_chance_is_coloured():
    rows = {"above": (0.8, 0.6, 0.9), "about": (0.6, 0.45, 0.7)}
    (axes,) = plots.intervals(rows, "AUC", chance=0.5).axes
    assert words(axes.get_yticklabels()) == ["above", "about"]
    points = axes.collections[-1]
    np.testing.assert_allclose(points.get_offsets()[:, 0], [80, 60])
    assert [to_hex(color).upper() for color in points.get_facecolors()] == [plots.GENERATED, plots.SERIES[0]]


def test_a_seed_is_a_mark_and_their_mean_a_large_one():
    values = {"a": {"x": [60, 70], "y": [80, 85]}, "b": {"x": [50, 52], "y": [90, 97]}}
    (axes,) = plots.methods_by_decoder(values, "AUC", chance=50).axes
    assert words(axes.get_xticklabels()) == ["x", "y"]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert drawn == [[50, 50], [60, 70], [80, 85], [65, 82.5], [50, 52], [90, 97], [51, 93.5]]


def test_differences_have_the_standard_error_of_their_mean():
    figure = plots.differences({"task": {"AUC": {"a": [1.0, 2.0, 6.0], "b": [-1.0]}}})
    first, second = figure.axes[0].containers
    ((low, high),) = (segment[:, 0] for segment in first.lines[2][0].get_segments())
    error = np.std([1, 2, 6], ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((3 - error, 3 + error)) and second.lines[0].get_xdata() == [-1]
    # One seed says nothing of an error.
    np.testing.assert_array_equal(second.lines[2][0].get_segments(), [[[-1, 1], [-1, 1]]])
    assert words(figure.axes[0].get_yticklabels()) == ["a", "b"]


def test_curves_leave_out_what_was_not_measured():
    seeds = [{"step": np.array([0, 1, 2]), "loss": np.array([4, np.nan, 2.0])}]
    seeds.append(seeds[0] | {"loss": np.array([8, np.nan, 4.0])})
    (axes,) = plots.curves({"a": seeds}, {"loss": "loss (training)"}).axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [([0, 2], [4, 2]), ([0, 2], [8, 4]), ([0, 2], [6, 3])]


def test_classes_have_their_own_colours_and_points():
    points, labels = np.array([[0, 1], [2, 3], [4, 5.0]]), np.array([0, 1, 1])
    (axes,) = plots.feature_maps({"map": points}, labels).axes
    real, generated = (cloud.get_offsets().tolist() for cloud in axes.collections)
    assert (real, generated) == ([[0, 1]], [[2, 3], [4, 5]])
    assert [to_hex(cloud.get_facecolors()[0]).upper() for cloud in axes.collections] == [
        plots.REAL,
        plots.GENERATED,
    ]
    (panel,) = plots.by_class({"width": np.array([1.0, 2, 3])}, labels).axes
    assert [sum(bar.get_height() for bar in bars) for bars in panel.containers] == pytest.approx([100, 100])


def test_an_svg_takes_the_colour_of_the_page(tmp_path):
    figure = plots.intervals({"$x^2$ <b>": (0.8, 0.6, 0.9)}, "AUC", chance=0.5)
    text = plots.svg(figure, 'a "b" <c>')
    assert text.startswith("<svg ") and re.search(r'viewBox="0 0 [0-9.]+ [0-9.]+"', text)
    assert 'role="img"' in text and 'aria-label="a &quot;b&quot; &lt;c&gt;"' in text
    assert "currentColor" in text and plots.INK not in text and "width=" not in text.partition(">")[0]
    assert "$x^2$ &lt;b&gt;" in text
    assert text == plots.svg(plots.intervals({"$x^2$ <b>": (0.8, 0.6, 0.9)}, "AUC", chance=0.5), 'a "b" <c>')
    plots.save(figure, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
