"""What a run says of itself: TensorBoard, a log's lines, a terminal's bar."""

import re
import sys

import pytest
from dgsnet.training import log as training_log
from dgsnet.training.log import Progress
from dgsnet.training.train import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import rows, settings


def test_tensorboard_holds_what_metrics_csv_holds(finished):
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_ap"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows(finished) if row[name]]
        assert [step for step, _ in seen] == [step for step, _ in expected]
        assert [value for _, value in seen] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_a_log_has_a_line_for_every_log_step_and_no_bar(dataset, tmp_path, capsys):
    train(settings(dataset, data_val=[], optim_epochs=1), tmp_path / "run")
    err = capsys.readouterr().err
    pattern = r"stage (\d) epoch 1/1: step (\d)/4, loss (\d\.\d{4}), [\d.]+ images/s, (\d\d:\d\d) left"
    lines = [re.fullmatch(pattern, line) for line in err.splitlines() if "warning" not in line]
    assert [line.group(1, 2) for line in lines] == [("1", "3"), ("1", "4"), ("2", "2"), ("2", "4")]
    losses = [f"{float(row['loss']):.4f}" for row in rows(tmp_path / "run")]
    assert [line.group(3) for line in lines] == losses
    assert lines[-1][4] == "00:00" and "\r" not in err


def test_a_terminal_has_a_bar_and_other_processes_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("stage 2 epoch 1/1", 2, 10) as progress:
        progress.step(32)
        progress.show(0.25)
    err = capsys.readouterr().err
    assert "3/10" in err and "loss 0.2500" in err and "images/s" in err and "\r" in err
    # This is the time that is left.
    assert re.search(r"<\d\d:\d\d", err)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with Progress("stage 2 epoch 1/1", 0, 1, silent=True) as progress:
            progress.step(32)
            progress.show(0.25)
    assert capsys.readouterr().err == ""


def test_the_time_that_is_left_counts_from_where_an_epoch_was_gone_on_with(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock[0])
    progress = Progress("stage 2 epoch 1/1", 8, 12)
    progress.step(5)
    progress.step(4)
    clock[0] += 2
    progress.show(0.5)
    assert "step 10/12, loss 0.5000, 4.5 images/s, 00:02 left" in capsys.readouterr().err
