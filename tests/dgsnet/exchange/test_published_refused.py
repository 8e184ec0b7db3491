"""Files that are no published detector, damaged or hostile, and downloads, end in one line or in a folder."""

import hashlib
import json
import pickle
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from dgsnet.cli import main
from dgsnet.errors import UserError
from dgsnet.exchange.convert import convert
from dgsnet.model.folders import read_model_config
from safetensors.torch import save, save_file

from tests.support import published
from tests.support.published import Random

NAME = "timm/vit_small_patch16_224_two"
COMMIT = "5d3f1c0"


@pytest.fixture(scope="module")
def community(tmp_path_factory):
    published.register(tmp_path_factory.mktemp("clip"))
    state = published.timm_state(384, 197, patch=16) | Random(5).linear("head", 1, 384)
    return {f"vit.{name}": tensor for name, tensor in state.items()}


def refused(capsys, file, out, *more):
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(file), "--out", str(out), *more])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and not out.exists()
    return message


PROJECTION = "vit.blocks.1.attn.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(PROJECTION), f"is Community Forensics .*{PROJECTION} is missing"),
        (
            lambda s: s.update({PROJECTION: torch.ones(384, 383)}),
            r"shape \[384, 383\], expected \[384, 384\]",
        ),
        (
            lambda s: s.update({PROJECTION: torch.ones(1).expand(10**6, 10**6)}),
            r"shape \[1000000, 1000000\]",
        ),
        (lambda s: s.update({PROJECTION: torch.full((384, 384), torch.nan)}), "not finite"),
        (lambda s: s.update({"vit.more": torch.ones(3)}), r"vit\.more is unknown"),
        (lambda s: s.update({"vit.head.bias": torch.ones(2)}), r"vit\.head\.bias has shape \[2\]"),
        (lambda s: s.update({PROJECTION: torch.ones(384, 384, dtype=torch.int8)}), "is a torch.int8 tensor"),
        (
            lambda s: [s.pop(name) for name in list(s)[:-1]] and s.update({"x": s.popitem()[1]}),
            "known are .*DDA",
        ),
        (lambda s: s.update({"gating_network.network.0.bias": s.pop("vit.cls_token")}), "Community"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(community, tmp_path, change, message):
    state = dict(community)
    change(state)
    torch.save({"model": state}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path / "theirs.pt", tmp_path / "run", name=NAME)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


def test_what_no_layout_expresses_is_named(tmp_path):
    torch.save({"model": {"module.gating_network.network.0.weight": torch.ones(2, 2)}}, tmp_path / "o.pth")
    with pytest.raises(UserError, match="is OmniAID"):
        convert(tmp_path / "o.pth", tmp_path / "run")


class Executed:
    def __reduce__(self):
        return print, ("executed",)


def test_damaged_and_hostile_files_are_refused_and_run_nothing(community, tmp_path, capsys):
    whole = save(community)
    torch.save({"model": community, "optimizer": Executed()}, tmp_path / "hostile.pt")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"vit.head.bias": Executed()}))
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "lies.safetensors").write_bytes(whole[:8].replace(whole[:2], b"\xff\xff") + whole[8:])
    for name in ("hostile.pt", "pickle.safetensors", "half.safetensors", "lies.safetensors"):
        message = refused(capsys, tmp_path / name, tmp_path / "run", "--name", NAME)
        assert "cannot be read as weights" in message and "executed" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"positive": "real"}, "positive='real'"),
        ({"origin": []}, "it is no object|origin"),
        ({"more": 1}, "unknown setting more"),
        ({"preprocess": {"mode": "crop", "resize": "shorter"}}, "preprocess.side=0"),
        ({"preprocess": {"mode": "crop", "side": 10**9, "resize": "squash"}}, "side=1000000000"),
        ({"model": {"feature": "text"}}, "model.feature='text'"),
    ],
)
def test_a_description_is_read_as_data_and_checked(tmp_path, change, message):
    (tmp_path / "detector.json").write_text(json.dumps({"model": {"name": NAME}} | change))
    with pytest.raises(UserError, match=message) as error:
        read_model_config(tmp_path)
    assert "detector.json" in str(error.value) and "\n" not in str(error.value)


def test_a_description_cannot_name_code(tmp_path):
    scripted = torch.jit.script(torch.nn.Identity())
    torch.jit.save(scripted, tmp_path / "clip.pt")
    said = {"model": {"name": "ViT-L-14-quickgelu", "pretrained": str(tmp_path / "clip.pt")}}
    (tmp_path / "detector.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="TorchScript and can run code"):
        read_model_config(tmp_path)


class Hub:
    """What the Hub answers, in place of its two functions that use the network."""

    def __init__(self, monkeypatch, folder, licence, *files):
        self.folder, self.asked = folder, []
        self.info = SimpleNamespace(
            sha=COMMIT,
            siblings=[SimpleNamespace(rfilename=name) for name in files],
            card_data=None if licence is None else {"license": licence},
        )
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def model_info(self, repository, *, revision=None):
        self.asked.append((repository, revision))
        if repository != "OwensLab/commfor-model-224":
            raise OSError("404 Client Error.\nRepository Not Found")
        return self.info

    def download(self, repository, file, *, revision):
        self.asked.append((repository, file, revision))
        return str(self.folder / file)


ADDRESS = "hf:OwensLab/commfor-model-224"


def test_a_download_says_revision_and_hash_and_keeps_them(community, tmp_path, capsys, monkeypatch):
    save_file(community, tmp_path / "model.safetensors")
    hub = Hub(monkeypatch, tmp_path, "mit", "config.json", "model.safetensors", "pytorch_model.bin")
    main(["convert", f"{ADDRESS}@main", "--out", str(tmp_path / "run"), "--name", NAME])
    printed = capsys.readouterr().out
    sha256 = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert COMMIT in printed and sha256 in printed and "licence mit" in printed
    assert hub.asked == [
        ("OwensLab/commfor-model-224", "main"),
        ("OwensLab/commfor-model-224", "model.safetensors", COMMIT),
    ]
    assert json.loads((tmp_path / "run" / "detector.json").read_text())["origin"] == {
        "layout": "Community Forensics (224 pixels)",
        "file": f"{ADDRESS}/model.safetensors",
        "revision": COMMIT,
        "sha256": sha256,
    }


@pytest.mark.parametrize(
    ("licence", "named"),
    [("cc-by-nc-4.0", "is under cc-by-nc-4.0"), (None, "no licence"), ("other", "other")],
)
def test_a_licence_is_asked_for_before_anything_is_fetched(
    community, tmp_path, capsys, monkeypatch, licence, named
):
    save_file(community, tmp_path / "model.safetensors")
    hub = Hub(monkeypatch, tmp_path, licence, "model.safetensors")
    message = refused(capsys, ADDRESS, tmp_path / "run", "--name", NAME)
    assert named in message and "--accept-licence" in message and len(hub.asked) == 1
    main(["convert", ADDRESS, "--out", str(tmp_path / "run"), "--name", NAME, "--accept-licence"])
    assert (tmp_path / "run" / "detector.json").is_file()


@pytest.mark.parametrize(
    ("address", "files", "message"),
    [
        (ADDRESS, ("a.pth", "b.pth"), "2 files of weights: a.pth, b.pth; name one"),
        (ADDRESS, ("README.md",), "holds 0 files of weights"),
        ("hf:OwensLab/none", ("a.pth",), "cannot download hf:OwensLab/none (404"),
        ("hf:OwensLab", ("a.pth",), "is no address"),
        (f"{ADDRESS}/../../x", ("a.pth",), "is no address"),
    ],
)
def test_a_download_that_cannot_be_is_one_line(tmp_path, capsys, monkeypatch, address, files, message):
    Hub(monkeypatch, tmp_path, "mit", *files)
    assert message in refused(capsys, address, tmp_path / "run", "--name", NAME)
