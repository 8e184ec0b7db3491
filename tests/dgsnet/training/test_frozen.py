"""Text features on disk: the encoder's own, computed once, shared, never silently wrong."""

import os

import numpy as np
import pytest
import torch
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.frozen import CaptionFeatures, default_folder

from tests.support.fresh import FORKSERVER

CAPTIONS = ["a dog", "a very long caption of a cat that sits on a mat", "", "sea", "a dog"]


def build(seed=0):
    torch.manual_seed(seed)
    return DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=0))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def encoded(model, monkeypatch):
    """The captions that the text encoder has been given since."""
    seen = []
    handle = model.text.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def test_features_are_the_text_encoders(model, tmp_path):
    features = CaptionFeatures(model, CAPTIONS, tmp_path)
    asked = ["sea", "a dog", "sea", ""]
    torch.testing.assert_close(features(asked), model.text_features(asked).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError):
        features(["never announced"])


def test_a_caption_is_encoded_once(model, encoded, tmp_path):
    first = CaptionFeatures(model, CAPTIONS, tmp_path)(CAPTIONS)
    assert encoded == [4]
    again = CaptionFeatures(model, CAPTIONS, tmp_path)(CAPTIONS)
    assert encoded == [4] and torch.equal(first, again)
    more = CaptionFeatures(model, [*CAPTIONS, "new"], tmp_path)(["new", "sea"])
    assert encoded == [4, 1] and torch.equal(more[1], first[3])
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 2 and not list(tmp_path.rglob(".*"))
    assert isinstance(np.load(files[0], mmap_mode="r"), np.memmap)


def test_a_link_beside_it_does_not_lead_what_is_written_elsewhere(model, tmp_path):
    (tmp_path / "victim").write_text("precious")
    expected = CaptionFeatures(model, CAPTIONS, tmp_path / "a")(CAPTIONS)
    (file,) = (tmp_path / "a").rglob("*.npy")
    there = tmp_path / "b" / file.relative_to(tmp_path / "a")
    there.parent.mkdir(parents=True)
    there.with_name(f".{file.name}.{os.getpid()}.new").symlink_to(tmp_path / "victim")
    assert torch.equal(CaptionFeatures(model, CAPTIONS, tmp_path / "b")(CAPTIONS), expected)
    assert (tmp_path / "victim").read_text() == "precious" and not there.is_symlink()


def shorten(text):
    text.context_length -= 1


def retrain(text):
    text.token_embedding.weight.data[-1, -1] += 1e-3


@pytest.mark.parametrize("change", [shorten, retrain])
def test_another_encoder_has_features_of_its_own(model, encoded, tmp_path, change):
    """Weights, and where captions are cut, change alone."""
    other = build()
    change(other.text)
    CaptionFeatures(other, CAPTIONS, tmp_path)
    features = CaptionFeatures(model, CAPTIONS, tmp_path)(["sea"])
    assert encoded == [4]
    torch.testing.assert_close(features, model.text_features(["sea"]).float(), rtol=1e-5, atol=1e-6)


def _encode_all(folder, start):
    torch.set_num_threads(1)
    captions = [f"photo {i}" for i in range(start, start + 40)]
    CaptionFeatures(build(), captions, folder)


def test_processes_share_a_folder(model, encoded, tmp_path):
    children = [FORKSERVER.Process(target=_encode_all, args=(tmp_path, start)) for start in (0, 20)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    features = CaptionFeatures(model, [f"photo {i}" for i in range(60)], tmp_path)
    assert encoded == []
    torch.testing.assert_close(
        features(["photo 30"]), model.text_features(["photo 30"]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_damaged_file_is_named(model, tmp_path, content):
    CaptionFeatures(model, CAPTIONS, tmp_path)
    (path,) = tmp_path.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(UserError, match=rf"{path.name} is damaged .*remove it") as caught:
        CaptionFeatures(model, CAPTIONS, tmp_path)
    assert "\n" not in str(caught.value)


def test_features_of_another_length_are_named(model, tmp_path):
    """And a file that is no array."""
    CaptionFeatures(model, CAPTIONS, tmp_path)
    (path,) = tmp_path.rglob("*.npy")
    rows = np.load(path)
    wide = np.zeros(len(rows), [("key", "V16"), ("feature", "<f4", (rows["feature"].shape[1] + 1,))])
    np.save(path, wide)
    with pytest.raises(UserError, match=r"is damaged \(numbers of type .*: remove it"):
        CaptionFeatures(model, CAPTIONS, tmp_path)
    with open(path, "wb") as file:
        np.savez(file, key=rows["key"], feature=rows["feature"])
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        CaptionFeatures(model, CAPTIONS, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be kept in .*file.* set data\.cache"):
        CaptionFeatures(model, CAPTIONS, tmp_path / "file")


def test_the_users_cache_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dgsnet"
