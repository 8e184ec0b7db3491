"""The page of an evaluation, and the sentences on it."""

import math
import re
from html.parser import HTMLParser

import numpy as np
from dgsnet.evaluation.report import markdown, verdict, write_page
from dgsnet.evaluation.results import Evaluation, Score

from tests.support.tables import measure
from tests.support.tiny import save_picture

RNG = np.random.default_rng(0)


def test_the_page_is_complete_and_self_contained(model, data, tmp_path):
    (data / "alpha").rename(data / "<b>DALLE-3 & $x^2$")
    sources = [f"AIGIBench={data}", str(data)]
    (data / "DALLE-3").mkdir()
    for label in ("0_real", "1_fake"):
        save_picture(data / "DALLE-3" / label / "0.png")
    measure(model, sources, tmp_path / "o", robustness=["jpeg:50"], threshold=0.48)
    text = (tmp_path / "o/report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page refers to another file"
    assert "{{" not in text and "{%" not in text
    assert "<b>DALLE" not in text and "&lt;b&gt;DALLE-3 &amp; $x^2$" in text
    # Two suites with bars and curves, distortions, distribution of scores.
    assert text.count("<svg ") == 6
    for expected in (
        "41.5",
        "jpeg:50",
        "broken.png: ",
        "at the threshold 0.48",
        'src="data:image/jpeg;base64,',
    ):
        assert expected in text

    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open_tags = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []


def test_the_mistakes_furthest_from_the_threshold_come_first(tmp_path):
    """Eight of either class, of more than eight, and none that was decided rightly."""
    wrong = {
        0: [round(0.41 + 0.05 * i, 3) for i in range(11)],
        1: [round(0.4 - 0.03 * i, 3) for i in range(10)],
    }
    right = {0: [0.1, 0.2, 0.4], 1: [0.41, 0.8, 0.9, 0.99, 1.0]}
    found = [
        Score(f"{label}/{value}.png", "g", label, value)
        for label in (0, 1)
        for value in RNG.permutation([*wrong[label], *right[label]]).tolist()
    ]
    found += [Score("0/unread.png", "g", 0, math.nan, "unread")]
    found += [Score(s.path, "g", s.label, 1.0 - s.label, distortion="jpeg:50") for s in found[:5]]
    write_page(tmp_path / "r.html", Evaluation(found, threshold=0.4), model="m")
    text = (tmp_path / "r.html").read_text()
    assert "<h3>Real, called generated: 11 of 14</h3>" in text
    assert "<h3>Generated, called real: 10 of 15</h3>" in text
    shown = re.findall(r"<b>([0-9.]+)</b> g\s*<small>(.*?)</small>", text)
    expected = [*sorted(wrong[0], reverse=True)[:8], *sorted(wrong[1])[:8]]
    assert shown == [(f"{value:.3f}", f"{value}.png") for value in expected]


def test_a_distortion_is_shaded_by_how_far_it_leads_to_guessing(tmp_path):
    found = [
        Score(f"{label}{i}", "a|b", label, p, distortion=distortion)
        for distortion, below in (("", 1), ("jpeg:50", 3), ("blur:1", 6), ("crop:0.9", 0))
        for label, scores in ((0, [0.5] * 4), (1, [0.2] * below + [0.8] * (10 - below)))
        for i, p in enumerate(scores)
    ]
    evaluation = Evaluation(found)
    write_page(tmp_path / "r.html", evaluation, model="m")
    cells = re.findall(r'style="--loss:(\d+)">([0-9.]+)<', (tmp_path / "r.html").read_text())
    assert cells == [("0", "90.0"), ("50", "70.0"), ("100", "40.0"), ("0", "100.0")]
    assert "Of the distortions blur:1 costs most: \N{MINUS SIGN}50.0 points of AUC." in verdict(evaluation)
    assert "| a\\|b | " in markdown(evaluation)


def test_several_suites_have_a_mean_of_all():
    def scores(*suites):
        return [Score(f"{s}{p}", "g", int(p > 0.5), p, suite=s) for s in suites for p in (0.1, 0.4, 0.6)]

    assert "All suites" not in markdown(Evaluation(scores("one")))
    text = markdown(Evaluation(scores("one", "two")))
    assert [line for line in text.splitlines() if line.startswith("## ")][:3] == [
        "## one",
        "## two",
        "## All suites",
    ]


def test_the_verdict_names_the_worst_first():
    def scores(generator, real, generated):
        values = [(0, p) for p in real] + [(1, p) for p in generated]
        return [Score(f"{generator}{i}", generator, label, p) for i, (label, p) in enumerate(values)]

    found = scores("half", [0.2, 0.8], [0.2, 0.8]) + scores("worse", [0.7, 0.8], [0.6, 0.75])
    found += scores("good", [0.1] * 97 + [0.6] * 3, [0.05] * 2 + [0.5] * 5 + [0.9] * 3)
    sentences = verdict(Evaluation([*found, Score("x", "good", 1, math.nan, "unread")], threshold=0.3))
    assert "Not told apart (AUC below 75.0): worse (AUC 25.0), half (AUC 50.0)." in sentences
    assert sentences[0].startswith("Over 3 generators: accuracy ") and "at the threshold 0.3" in sentences[0]
    assert sentences[-1] == "1 image could not be read and is in no figure."
    one, five = re.findall(r"(\d+\.\d) \(", sentences[1])
    mean = Evaluation(found, threshold=0.3).mean()
    assert (one, five) == (f"{100 * mean['tpr_at_1']:.1f}", f"{100 * mean['tpr_at_5']:.1f}") and one != five


def test_the_verdict_follows_the_numbers():
    def scores(generator, real, generated, distortion=""):
        return [
            Score(f"{generator}{label}{i}", generator, label, p, "", "", distortion)
            for label, values in ((0, real), (1, generated))
            for i, p in enumerate(values)
        ]

    good = scores("good", [0.1] * 20, [0.9] * 20)
    moved = scores("moved", [0.6] * 20, [0.9] * 20)
    blind = scores("blind", [0.3, 0.7] * 10, [0.3, 0.7] * 10)
    sentences = " ".join(verdict(Evaluation(good + moved + blind)))
    assert "Not told apart (AUC below 75.0): blind (AUC 50.0)." in sentences
    assert "the threshold 0.5 is wrong: moved (AUC 100.0)." in sentences
    assert "distortion" not in sentences and "could not be read" not in sentences

    swept = good + scores("good", [0.1] * 20, [0.9] * 20, "jpeg:90") + scores("good", [0.5], [0.5], "blur:2")
    sentences = " ".join(verdict(Evaluation(swept)))
    assert "blur:2 costs most: \N{MINUS SIGN}50.0 points of AUC" in sentences
    assert "Not told apart" not in sentences and "is wrong" not in sentences
