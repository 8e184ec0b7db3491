"""A run that was killed or stopped ends as one that was not, and is resumed as itself only."""

import json
import random
import shutil
import signal
import time

import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config
from dgsnet.errors import UserError
from dgsnet.model import checkpoint
from dgsnet.model.pretrained import build_clip
from dgsnet.training.train import train
from safetensors.torch import save_file

from tests.support.runs import (
    METRICS_FILE,
    STATE_FILE,
    equal,
    fails,
    interrupted_after,
    launch,
    settings,
    weights,
    write_config,
    write_images,
)


@pytest.fixture
def command(dataset, tmp_path):
    """The command line of the finished run, for another folder."""
    path = write_config(tmp_path / "run.yaml", settings(dataset))
    return ["train", "--config", path, "--checkpoint_every", "2", "--out", str(tmp_path / "run"), "--resume"]


def assert_as_uninterrupted(run, finished):
    for which in ("best", "last"):
        assert equal(weights(run, which), weights(finished, which))
        assert checkpoint.read_extra(run / which) == checkpoint.read_extra(finished / which)
        assert checkpoint.trained_on(run / which).tolist() == checkpoint.trained_on(finished / which).tolist()
    assert (run / METRICS_FILE).read_bytes() == (finished / METRICS_FILE).read_bytes()
    assert not [path for path in run.rglob(".*")]


def test_killed_while_writing_and_resumed_it_ends_with_the_same_weights(command, finished, tmp_path):
    """Each life of the run ends at another change to the file system: within checkpoints, models, renames."""
    rng = random.Random(0)
    lives, code = 0, None
    while code != 0:
        # A life gets further than the one before unless it dies before its first checkpoint.
        code = launch(command, fatal_call=rng.randint(1, 30) if lives < 6 else 0)
        assert code in (0, -signal.SIGKILL)
        lives += 1
    assert lives > 3
    assert_as_uninterrupted(tmp_path / "run", finished)


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_weights(command, finished, tmp_path):
    clock = time.monotonic()
    assert launch([*command[:-2], str(tmp_path / "timed")]) == 0
    whole = time.monotonic() - clock
    for _ in range(3):
        moment = random.uniform(0.2, 0.9) * whole
        print(f"killed after {moment:.3f} of {whole:.3f} s")
        assert launch(command, seconds=moment) in (0, -signal.SIGKILL)
    assert launch(command) == 0
    assert_as_uninterrupted(tmp_path / "run", finished)
    # Nothing is left to do.
    assert launch(command) == 0
    assert_as_uninterrupted(tmp_path / "run", finished)


def test_a_run_is_not_resumed_on_another_backbone(dataset, tmp_path):
    clip = build_clip("dgsnet-tiny", "", with_text=True)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    config = settings(dataset, model_pretrained=str(tmp_path / "clip.safetensors"), data_captions="none")
    with interrupted_after(1):
        train(config, tmp_path / "run")
    clip.visual.ln_post.bias.data += 1
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"the weights of dgsnet-tiny have changed"):
        train(config, tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_on_other_images_labels_or_captions(dataset, tmp_path):
    """Each of them changes alone, and then none does."""
    images = sorted((dataset / "train").rglob("*.png"))
    labels = {str(path): path.parent.name[2:] for path in images}
    captions = {str(path): "noise" for path in images}
    moved = shutil.copy(images[3], tmp_path / "moved.png")
    train_list, caption_file = tmp_path / "list.csv", tmp_path / "captions.json"

    def written(labels, captions):
        train_list.write_text("\n".join(["path,label", *(",".join(row) for row in labels.items())]))
        caption_file.write_text(json.dumps(captions))
        return settings(dataset, data_train=[str(train_list)], data_val=[], data_captions=str(caption_file))

    run = tmp_path / "run"
    with interrupted_after(1):
        train(written(labels, captions), run)
    path, *others = labels
    renamed = {str(moved) if key == str(images[3]) else key: label for key, label in labels.items()}
    for other in (
        (labels | {path: "fake"}, captions),
        (labels, captions | {path: "a dog"}),
        (renamed, captions | {str(moved): "noise"}),
        ({key: labels[key] for key in others}, captions),
    ):
        with pytest.raises(UserError, match="the training images, their labels or captions have changed"):
            train(written(*other), run, resume=True)
    train(written(labels, captions), run, resume=True)


def test_resume_takes_the_runs_own_settings(finished, dataset, capsys):
    cli.main(["train", "--out", str(finished), "--resume", "--data.workers", "1"])
    assert "is already trained" in capsys.readouterr().out
    assert Config.load(finished / "config.json") == settings(dataset)


def test_resume_without_a_run_starts_one_or_says_what_is_missing(dataset, tmp_path, capsys):
    line = fails(["train", "--out", str(tmp_path / "run"), "--resume"], capsys)
    assert "no training images" in line
    assert "holds no run to resume" in line
    run = train(settings(dataset, optim_epochs=1, data_val=[]), tmp_path / "run", resume=True)
    assert (run / "best").is_dir()


def test_runs_of_before_there_were_experts_are_read_and_go_on(dataset, tmp_path):
    """Their configuration and state lack what came with the experts."""
    config = settings(dataset, checkpoint_every=2, data_val=[])
    out = tmp_path / "run"
    # This stops within stage 2.
    with interrupted_after(4):
        train(config, out)
    saved = json.loads((out / "config.json").read_text())
    for section, name in (("surgery", "text"), ("surgery", "distillation"), ("data", "nuisances")):
        del saved[section][name]
    del saved["augment"]
    (out / "config.json").write_text(json.dumps(saved))
    assert Config.load(out / "config.json") == config
    state = checkpoint.load_state(out / STATE_FILE)
    assert state["position"]["stage"] == 2
    del state["expert"], state["moments"], state["trained_on"]
    checkpoint.save_state(out / STATE_FILE, state)
    assert equal(weights(train(config, out, resume=True)), weights(train(config, tmp_path / "whole")))


WRONG = {
    "stage": lambda state: state["position"].update(stage=0),
    "sums": lambda state: state.update(sums=state["sums"][:2]),
    "a moment": lambda state: state["optimizer"]["state"][1].pop("exp_avg"),
    "another's moment": lambda state: state["optimizer"]["state"][1].update(exp_avg_sq=torch.zeros(3, 7)),
    "recent": lambda state: state.update(recent=[{}]),
    "a part": lambda state: state.pop("backbone"),
}


def test_a_damaged_state_is_refused_in_one_line(tmp_path):
    """Whatever in it is damaged, nothing is trained; and what is left is not."""
    data, run = write_images(tmp_path / "data", (4, 3)), tmp_path / "run"
    few = {"optim_batch_size": 4, "optim_epochs": 1, "data_captions": "none", "checkpoint_every": 1}
    config = settings(data, data_val=[], **few)
    # The state has an optimiser in it.
    with interrupted_after(1):
        train(config, run)
    whole = (run / STATE_FILE).read_bytes()
    for what, damage in WRONG.items():
        state = checkpoint.load_state(run / STATE_FILE)
        damage(state)
        checkpoint.save_state(run / STATE_FILE, state)
        with pytest.raises(UserError, match=r"resume\.pt is damaged \(.*\): remove ") as caught:
            train(config, run, resume=True)
        assert "\n" not in str(caught.value), what
        (run / STATE_FILE).write_bytes(whole)
    first = (run / METRICS_FILE).read_bytes()
    (run / METRICS_FILE).write_bytes(b"\xff" + first[1:])
    with pytest.raises(UserError, match=r"metrics\.csv is damaged, its first line names no columns"):
        train(config, run, resume=True)
    (run / METRICS_FILE).write_bytes(first)
    assert (train(config, run, resume=True) / "last").is_dir()
