"""No file that a command finds in a folder runs code: each is replaced by pickles that would leave a mark."""

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from dgsnet.cli import COMMANDS, main
from onnx import helper
from PIL import Image

from tests.support.tiny import add_quick_gelu

# A CLIP with the activation of OpenAI's, whose TorchScript is loaded; of any other it is refused earlier.
TRAIN = (
    "train --model.name tiny-quickgelu --model.pretrained weights.pt "
    "--preprocess.mode crop --preprocess.image_size 64 --preprocess.normalization clip "
    "--data.train data/train --data.val data/val --data.workers 0 "
    "--optim.batch_size 3 --optim.max_steps 2 --checkpoint_every 1"
)
TWINS = "twins --data data/train --workers 0 --out"
SEVERAL = "evaluate --model a=run b=run/last --data data/val --workers 0 --out"
UPDATE = "update --model run --data data/train --replay data/val --steps 1 --out"


def network():
    """The ONNX of one whose logit is the mean of the pixels."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[1, 2, 3], keepdims=0)],
        "mean",
        [helper.make_tensor_value_info("pixels", 1, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", 1, ["batch"])],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


class Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def with_member(archive, name, content):
    file = io.BytesIO(archive)
    with zipfile.ZipFile(file, "a") as members:
        members.writestr(name, content)
    return file.getvalue()


def hostile(mark):
    """Files by kind: as pickle, torch and NumPy write them, and torch's dressed up as TorchScript."""
    mark, array = Mark(mark), io.BytesIO()
    np.save(array, np.array([mark], dtype=object), allow_pickle=True)
    archive = saved(mark)
    root = zipfile.ZipFile(io.BytesIO(archive)).namelist()[0].partition("/")[0]
    return {
        "pickle": pickle.dumps(mark),
        "legacy": pickle.dumps(mark, protocol=2),
        "array": array.getvalue(),
        "torch": archive,
        "nested constants": with_member(archive, f"{root}/deep/constants.pkl", pickle.dumps(mark)),
        "foreign constants": with_member(archive, "other/constants.pkl", pickle.dumps(mark)),
        "TorchScript": with_member(archive, f"{root}/constants.pkl", pickle.dumps(mark)),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with whatever commands read: images, captions, weights, a run, an update, what a kill left."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for split, count in {"train": 10, "val": 5}.items():
        for name in ("0_real", "1_fake"):
            (place / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "data" / split / name / f"{i}.png")
        root = place / "data" / split
        captions = {str(path.relative_to(root)): f"noise {path.stem}" for path in root.glob("*/*.png")}
        (root / "captions.json").write_text(json.dumps(captions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        from dgsnet.model.pretrained import build_clip

        add_quick_gelu(place, "tiny-quickgelu")
        (place / "scores.csv").write_text(
            "path,score,label\n" + "".join(f"{i},{i},{i // 9}\n" for i in range(18))
        )
        (place / "reviewed.csv").write_text("path,decision,truth\na.png,real,real\n")
        (place / "net.onnx").write_bytes(network())
        said = {"model": {}, "preprocess": {"mode": "crop", "image_size": 32}}
        (place / "net.onnx.detector.json").write_text(json.dumps(said))
        torch.save(build_clip("tiny-quickgelu", "", True).state_dict(), "weights.pt")
        for words in (
            f"{TRAIN} --out run",
            "audit --data data/train --out audit",
            "calibrate --model run --reals data/val/0_real --fpr 0.5",
            "monitor --model run --reviewed reviewed.csv",
            "calibrate --model net.onnx --reals data/val/0_real --fpr 0.5 --workers 0",
            "monitor --model net.onnx --reviewed reviewed.csv",
            "calibrate --scores scores.csv --out rule --fpr 0.5",
            "monitor --model rule --scores scores.csv",
            f"{UPDATE} update",
            "evaluate --model run --data data/val --out results",
            f"{SEVERAL} both",
        ):
            assert call(words) == 0
        with pytest.MonkeyPatch.context() as stop:
            stop.setattr("dgsnet.data.items.Item.read", interrupt)
            assert call("predict data/val --model run --out scores.csv --workers 0") == 130
            stop.setattr("dgsnet.twins.command.write_file", interrupt)
            assert call(f"{TWINS} half --by resize") == 130
    (place / "captioner").mkdir()
    (place / "captioner" / "config.json").write_text(json.dumps({"model_type": "blip"}))
    (place / "captioner" / "pytorch_model.bin").touch()
    (place / "autoencoder").mkdir()
    (place / "autoencoder" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (place / "autoencoder" / "diffusion_pytorch_model.bin").touch()
    return place


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    return tmp_path / "place"


def call(words):
    """A command's exit code; a traceback would end the test."""
    try:
        main(words.split())
    except SystemExit as stop:
        return stop.code
    return 0


# Of each command, the words and where it may find files other than images. `demo` makes all that it reads.
LINES = {
    "audit": ("audit --data data/train --out new", "data/train/*.json"),
    "train": (f"{TRAIN} --out new", "data/*/*.json weights.pt"),
    "train, resumed": ("train --out run --resume", "run/*.json run/best/* run/last/* run/state/* weights.pt"),
    "update": (f"{UPDATE} new", "run/best/* weights.pt"),
    "update, resumed": (f"{UPDATE} update --resume", "update/*.json update/best/* update/state/* weights.pt"),
    "evaluate": (
        "evaluate --model run --data data/val --audit audit/audit.json --out new",
        "run/best/* audit/*.json weights.pt",
    ),
    "evaluate, again": ("evaluate --model run --data data/val --out results", "results/*.jsonl"),
    "evaluate, several": (f"{SEVERAL} both", "both/*/*.jsonl"),
    "predict": ("predict data/val --model run --out new.csv --workers 0", "run/best/* weights.pt"),
    "predict, resumed": (
        "predict data/val --model run --out scores.csv --workers 0 --resume",
        "scores.csv.partial",
    ),
    "predict, of ONNX": ("predict data/val --model net.onnx --out new.csv --workers 0", "net.onnx*"),
    "calibrate": (
        "calibrate --model run --reals data/val/0_real --fpr 0.5 --replace",
        "run/best/* weights.pt",
    ),
    "calibrate, of scores": ("calibrate --scores scores.csv --out new --fpr 0.5", "scores.csv"),
    "evaluate, of scores": ("evaluate --scores scores.csv --model rule --out new", "rule/*.json scores.csv"),
    "predict, of scores": ("predict scores.csv --model rule --out new.csv", "rule/*.json scores.csv"),
    "monitor, of scores": ("monitor --model rule --scores scores.csv", "rule/*.json scores.csv"),
    "monitor": ("monitor --model run --reviewed reviewed.csv", "run/best/*.json reviewed.csv"),
    "average": ("average run run/last --out new", "run/best/* run/last/* weights.pt"),
    "convert": ("convert weights.pt --out new", "weights.pt"),
    "export": ("export --model run --format safetensors --out new.safetensors", "run/best/* weights.pt"),
    "serve": ("serve --model run --port 0", "run/best/* weights.pt"),
    "caption": ("caption --data data/train --out new.json --model captioner", "captioner/*"),
    "twins": ("twins --data data/train --out new --by vae:autoencoder", "autoencoder/* data/train/*.json"),
    "twins, resumed": (f"{TWINS} half --by resize --resume", "half/*.partial"),
}
# What a reader of such files might take; weights are tried as everything.
FITTING = {
    ".csv": ["pickle"],
    ".json": ["pickle"],
    ".jsonl": ["pickle"],
    ".partial": ["pickle"],
    ".npy": ["array", "pickle"],
    ".safetensors": ["torch", "pickle"],
}


def test_every_command_is_here():
    assert {name.partition(",")[0] for name in LINES} == COMMANDS.keys() - {"demo"}


# torch warns about what it finds.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LINES)
def test_what_a_command_finds_runs_no_code(name, here, capsys):
    words, patterns = LINES[name]
    mark = here / "mark"
    kinds = hostile(mark)
    found = [path for pattern in patterns.split() for path in sorted(here.glob(pattern))]
    assert len(found) >= len(patterns.split())
    for path in found:
        content = path.read_bytes()
        for kind in FITTING.get(path.suffix, kinds):
            path.write_bytes(kinds[kind])
            code = call(words)
            said = capsys.readouterr().err
            assert not mark.exists(), f"{path.name} as {kind} ran code"
            assert code in (0, 2) and (code == 0 or said.splitlines()[-1].startswith("dgsnet: ")), said
            for left in here.glob("new*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        path.write_bytes(content)


def test_the_files_do_run_code_in_hands_that_trust_them(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "file"
    for kind, content in hostile(mark).items():
        file.write_bytes(content)
        # What they hold is no tensor, which is found only after it has run.
        with contextlib.suppress(Exception):
            if kind == "array":
                np.load(file, allow_pickle=True)
            else:
                torch.load(file, weights_only=False)
        # torch itself refuses these two.
        assert mark.exists() == (kind not in ("foreign constants", "TorchScript")), kind
        if mark.exists():
            mark.rmdir()


def modules(state):
    """A module that has these tensors by these names, as TorchScript wants them."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, tensor)
    return root


# torch deprecates TorchScript.
@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_loaded_only_where_it_is_named(here, capsys):
    torch.jit.save(torch.jit.script(modules(torch.load("weights.pt"))), "openai.pt")
    named = "--model.pretrained openai.pt"
    assert call(f"{TRAIN} --out new".replace("--model.pretrained weights.pt", named)) == 0

    capsys.readouterr()
    for line, _ in LINES.values():
        if "--model run" not in line or "--resume" in line or line.startswith("monitor"):
            # The monitor reads no weights.
            continue
        line = line.replace("--model run", "--model new")
        line = line.replace("--out new", "--out other").replace("--out results", "--out other")
        assert call(line) == 2, line
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "TorchScript" in said and "--pretrained openai.pt" in said
        assert not list(here.glob("other*"))
        assert call(f"{line} --pretrained openai.pt") == 0, line
        for left in here.glob("other*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        capsys.readouterr()

    assert call("train --out new --resume") == 2
    assert "--model.pretrained openai.pt" in capsys.readouterr().err
    assert call(f"train --out new --resume {named}") == 0
