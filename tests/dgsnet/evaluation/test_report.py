"""The page of an evaluation, and the sentences on it."""

import re
from html.parser import HTMLParser

from dgsnet.evaluation.report import verdict
from dgsnet.evaluation.results import Evaluation, Score

from tests.support.tables import measure
from tests.support.tiny import save_picture


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
