"""benchmarks/update.py: what is summed up, and that a study that was stopped goes on where it was."""

import argparse
import json
from dataclasses import replace

import pytest
from dgsnet import builtin

from benchmarks import update as study


@pytest.fixture
def small(monkeypatch):
    """One seed, two rules, one arrival, a few images, one step."""
    monkeypatch.setattr(builtin, "COUNTS", {"train": 4})
    monkeypatch.setattr(study, "TEST_IMAGES", 2)
    for name, value in {"SEEDS": (0,), "RULES": ("gem", "none"), "ARRIVALS": ("bilinear",)}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "CHOICE_SEEDS", (100,))
    monkeypatch.setattr(study, "CHOICE_ARRIVALS", ("bilinear",))
    monkeypatch.setattr(study, "CHOICES", {"lr": (1e-3, 2e-3), "steps": (1,)})
    monkeypatch.setattr(study, "START", study.START | {"steps": 1})
    config = builtin.demo_config

    def short(root, steps=1):
        made = config(root)
        return replace(made, optim=replace(made.optim, head_epochs=1, epochs=1))

    monkeypatch.setattr(builtin, "demo_config", short)
    study.exam.cache_clear()
    yield
    study.exam.cache_clear()


def test_summary_is_of_what_is_known():
    scores = dict(zip((*study.BASE, *study.ARRIVALS), (0.1, 0.2, 0.3, 0.4, 0.8, 0.9)))
    row = {"arrived": study.ARRIVALS[1], "auc": scores}
    assert study.summary(row, "auc") == pytest.approx({"old": 0.25, "new": 0.8, "all": 0.36})


def test_a_stopped_study_goes_on(small, tmp_path, monkeypatch, capsys):
    arguments = argparse.Namespace(out=tmp_path / "update.json")
    whole = list(study.results(arguments))
    choices, rows = whole[:3], whole[3:]
    assert [(row["setting"], row["value"]) for row in choices] == [("lr", 1e-3), ("lr", 2e-3), ("steps", 1)]
    # The settings are the same, and were measured once.
    assert choices[1]["auc"] == choices[2]["auc"]
    assert rows[0]["settings"] == study.best(choices)
    assert [(row["rule"], row["arrived"]) for row in rows] == [
        ("gem", ""),
        ("gem", "bilinear"),
        ("none", ""),
        ("none", "bilinear"),
    ]
    assert rows[0]["auc"] == rows[2]["auc"]
    assert "| mean | gem \N{MINUS SIGN} none | " in capsys.readouterr().out

    arguments.out.write_text(json.dumps({"results": whole[:6]}))
    made = []
    chain = study.chain
    monkeypatch.setattr(
        study,
        "chain",
        lambda folder, seed, rule, *more: made.append(rule) or chain(folder, seed, rule, *more),
    )
    again = list(study.results(arguments))
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in run] for run in (whole, again)]
    assert timeless[0] == timeless[1] and made == ["none"]
