"""Model folders and resume states: whole or absent wherever the writer dies, refused in one line if unfit."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.errors import UserError
from dgsnet.model import checkpoint
from safetensors.torch import load_file, save_file

CONFIG = Config(
    model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2),
    preprocess=PreprocessConfig(mode="crop", image_size=32),
)


@pytest.fixture(scope="module")
def trained():
    """A model whose adapters and heads are not those it was made with."""
    model = checkpoint.build_model(CONFIG, with_text=False).eval()
    generator = torch.Generator().manual_seed(1)
    state = {n: torch.randn(t.shape, generator=generator) for n, t in checkpoint.trained_state(model).items()}
    checkpoint.load_trained_state(model, state)
    return model


@pytest.fixture
def folder(trained, tmp_path):
    return checkpoint.save_model(tmp_path / "run" / "best", trained, CONFIG, step=7)


def same(a, b):
    a, b = checkpoint.trained_state(a), checkpoint.trained_state(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_model_scores_as_the_saved_one(trained, folder):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded, config = checkpoint.load_model(folder)
    assert config == CONFIG
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded.logits(pixels), trained.logits(pixels))
        assert torch.equal(loaded.teacher_logits(pixels), trained.teacher_logits(pixels))
    assert checkpoint.read_extra(folder) == {"step": 7}
    # The run folder names the same model.
    assert same(checkpoint.load_model(folder.parent)[0], trained)


def test_nothing_of_the_backbone_is_saved(folder):
    state = load_file(folder / "adapters.safetensors")
    assert all("lora_" in name or name.startswith("head.") for name in state)
    assert {n for n in state if n.startswith("head.")} == {
        f"head.{head}.{kind}"
        for head in ("image_head", "teacher_head", "text_head")
        for kind in ("weight", "bias")
    }
    assert sorted(os.listdir(folder)) == ["adapters.safetensors", "config.json"]


def test_building_a_model_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (checkpoint.build_model(CONFIG, with_text=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)
    assert checkpoint.fingerprint(first) == checkpoint.fingerprint(second)


def test_the_fingerprint_is_of_every_frozen_tensor_and_of_nothing_else(trained):
    model = checkpoint.build_model(CONFIG, with_text=False)
    before = checkpoint.fingerprint(model)
    # The fingerprint does not depend on the adapters.
    assert checkpoint.fingerprint(trained) == before
    assert checkpoint.fingerprint(model.set_base_dtype(torch.bfloat16)) == before
    for name, parameter in model.visual.named_parameters():
        if "lora_" not in name:
            kept = parameter.data.clone()
            parameter.data += 1
            assert checkpoint.fingerprint(model) != before, name
            parameter.data = kept
    assert checkpoint.fingerprint(model) == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


@pytest.fixture
def die_at(monkeypatch):
    """die_at(k): the k-th change to the file system from now on does not happen, nor any after it."""

    def arm(k):
        left = [k]

        def guard(original):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] <= 0:
                    raise Killed
                return original(*arguments, **options)

            return call

        for module, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")]:
            monkeypatch.setattr(module, name, guard(getattr(module, name)))

    with monkeypatch.context() as monkeypatch:
        yield arm


@pytest.mark.parametrize("k", range(1, 12))
def test_a_model_folder_is_the_old_or_the_new_one_wherever_the_writer_dies(k, die_at, tmp_path, trained):
    old = checkpoint.build_model(CONFIG, with_text=False)
    checkpoint.save_model(tmp_path / "best", old, CONFIG, step=1)
    die_at(k)
    finished = False
    try:
        checkpoint.save_model(tmp_path / "best", trained, CONFIG, step=2)
        finished = True
    except Killed:
        pass
    loaded, step = checkpoint.load_model(tmp_path)[0], checkpoint.read_extra(tmp_path)["step"]
    assert same(loaded, {1: old, 2: trained}[step])
    if finished:
        assert step == 2
        assert os.listdir(tmp_path) == ["best"]
    # Every earlier k stopped the writer somewhere.
    assert finished == (k > 9)


@pytest.mark.parametrize("k", range(1, 6))
def test_a_resume_state_is_the_old_or_the_new_one_wherever_the_writer_dies(k, die_at, tmp_path):
    path = tmp_path / "resume.pt"
    checkpoint.save_state(path, {"step": 1, "weights": torch.ones(3)})
    die_at(k)
    finished = False
    try:
        checkpoint.save_state(path, {"step": 2, "weights": torch.zeros(3)})
        finished = True
    except Killed:
        pass
    state = checkpoint.load_state(path)
    assert state["step"] == 2 if finished else state["step"] in (1, 2)
    assert torch.equal(state["weights"], {1: torch.ones(3), 2: torch.zeros(3)}[state["step"]])
    assert finished == (k > 4)


def test_a_damaged_resume_state_is_refused(tmp_path):
    checkpoint.save_state(tmp_path / "resume.pt", {"step": 1})
    (tmp_path / "resume.pt").write_bytes((tmp_path / "resume.pt").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"resume\.pt is damaged .*remove"):
        checkpoint.load_state(tmp_path / "resume.pt")


def _edit_config(section, **values):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (config[section] if section else config).update(values)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _edit_weights(change, header=None):
    def edit(folder):
        path = folder / "adapters.safetensors"
        with checkpoint.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        change(state)
        save_file(state, path, metadata=metadata if header is None else header)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged"),
        (_edit_config("model", colour="red"), r"config\.json .*unknown setting model\.colour"),
        (_edit_config("", model=3), r"config\.json is damaged"),
        (_edit_config("optim", batch_size=0), r"batch_size=0 must be at least 1"),
        (_edit_config("model", lora_rank=3), r"does not fit .*are of rank \[2\], and lora_rank is 3"),
        (_edit_config("model", lora_rank=0), r"does not fit .*are of rank \[2\], and lora_rank is 0"),
        (_edit_config("model", lora_rank=2.5), r"model\.lora_rank=2\.5 is no whole number"),
        (_edit_config("model", lora_rank=10**9), r"lora_rank=1000000000 must be in 0\.\.4096"),
        (_edit_config("model", lora_targets="mlp"), r"does not fit .*is unknown to this backbone"),
        (_edit_weights(lambda s: s.update(more=torch.zeros(2))), r"does not fit .*more is unknown to this"),
        (
            _edit_weights(lambda s: s.update({"head.text_head.bias": torch.zeros(2)})),
            r"adapters\.safetensors does not fit .*shape \[2\], expected \[1\]",
        ),
        (_edit_config("", seed=5), r"other weights of dgsnet-tiny .*fingerprint"),
        (_edit_weights(lambda s: s.pop("head.text_head.bias")), r"head\.text_head\.bias is missing"),
        (_edit_weights(lambda s: s["head.text_head.bias"].fill_(torch.nan)), r"not finite"),
        (_edit_weights(lambda s: None, header={}), r"no model of this version"),
        (
            lambda f: (f / "adapters.safetensors").write_bytes(b"\0" * 100),
            r"adapters\.safetensors is damaged",
        ),
        (lambda f: os.truncate(f / "adapters.safetensors", 5000), r"adapters\.safetensors is damaged"),
        (lambda f: (f / "adapters.safetensors").unlink(), r"best is no model|no finished model"),
        (shutil.rmtree, r"no model at"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model(folder)
    assert "\n" not in str(error.value)


def test_a_run_folder_without_a_model_says_so(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    with pytest.raises(UserError, match="no finished model yet"):
        checkpoint.load_model(tmp_path)


def test_an_empty_configuration_downloads_nothing(folder, monkeypatch):
    """It would mean the published backbone."""
    monkeypatch.setattr(checkpoint, "build_model", None)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is damaged.*it names no model"):
        checkpoint.load_model(folder)


def test_what_a_model_was_trained_on(folder, trained):
    # This model does not say what it was trained on.
    assert checkpoint.trained_on(folder).tolist() == []
    hashes = np.array([-5, 3, 2**62])
    state, backbone = checkpoint.trained_state(trained), checkpoint.fingerprint(trained)
    checkpoint.write_model(folder, state, backbone, CONFIG, trained_on=hashes)
    assert checkpoint.trained_on(folder.parent).tolist() == hashes.tolist()
    assert same(checkpoint.load_model(folder)[0], trained)
    path = folder / "training_images.npy"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"training_images\.npy is damaged"):
        checkpoint.trained_on(folder)
