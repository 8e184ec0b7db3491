"""Whatever a model's folder holds: a model comes of it, or one line, soon and in little memory."""

import copy
import json
import random
import shutil
import struct
import time

import numpy as np
import psutil
import pytest
from dgsnet.cli import main
from dgsnet.data.images import file_hash
from dgsnet.detection.decisions import calibrate, decide, load_calibration, save_calibration
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import load_model, read_extra, trained_on
from dgsnet.model.folders import read_model_config

from tests.support.tiny import CROP, save_noise, save_tiny

WEIGHTS = "adapters.safetensors"
# What a text, a number, a list or an object may be replaced by, as JSON.
WORDS = """null true [] {} "" -1 0 1.5 3 1e9 1000000000 1e400 -1e400 NaN Infinity -Infinity
[[1]] [{"name":3}] "\\u0000" "\\ud800" "../../x" "ViT-B-32" "timm/vit_x" "builtin" "none.pt"
"/dev/zero" "." \xff"""
VALUES = WORDS.split()
VALUES += ["1" * 30, "1" * 400, "1" * 5000, f'"{"x" * 9999}"', "[" * 100_000 + "]" * 100_000]
VALUES += ['{"a":' * 5000 + "1" + "}" * 5000]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder with all that commands read from one, and an image."""
    root = tmp_path_factory.mktemp("whole")
    save_tiny(root, CROP)
    rng = np.random.default_rng(0)
    sources = {"a": rng.normal(-1, 1, 300), "b": rng.normal(-2, 1, 200)}
    save_calibration(root, calibrate(sources, rng.normal(1, 1, 300), fpr=0.05))
    save_noise(root, 1)
    hashes = [file_hash((root / "00.png").read_bytes()), 5, 2**40]
    np.save(root / "best" / "training_images.npy", np.sort(hashes))
    return root


def paths_in(value, path=()):
    """The path of every value in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def changed_json(text, rng):
    """A JSON document with one value replaced, removed, added, or put in another's place."""
    document = json.loads(text)
    *outer, last = rng.choice([path for path in paths_in(document) if path])
    owner = document
    for key in outer:
        owner = owner[key]
    kind = rng.randrange(8)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner["more"] = owner[last]
    elif kind == 2:
        owner[last] = copy.deepcopy(document[rng.choice(list(document))])
    else:
        owner[last] = "PLACE"
    return json.dumps(document).replace('"PLACE"', rng.choice(VALUES)).encode("utf-8", "surrogatepass")


def changed_bytes(data, rng):
    """Bytes flipped, cut off, repeated or replaced by digits."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at : at + rng.randrange(1, 64)]
    else:
        data[at : at + 1] = rng.choice([b"9" * 15, b"-1", b"(", b"\0", b"\xff\xff\xff\xff"])
    return bytes(data)


def changed_header(data, rng):
    """Weights whose header is another document."""
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        return changed_bytes(data[: 8 + size], rng) + data[8 + size :]
    header = changed_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def changed_numbers(data, rng):
    """NumPy's file with another header."""
    if rng.random() < 0.5:
        return changed_bytes(data[:128], rng) + data[128:]
    shape = rng.choice(
        ["(3, 1)", "(10000000000000,)", "(-3,)", "()", "(" * 500, "(3.0,)", "('a',)", "[3]", "None"]
    )
    kind = rng.choice(["<i8", "|O", "<f8", "<U99999999", "V8", "no", "<i4"])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + data[128:]


def changed_any(data, rng):
    return changed_json(data, rng) if rng.random() < 0.8 else changed_bytes(data, rng)


def read_all_of_calibration(folder):
    if found := load_calibration(folder):
        assert {*decide([0.0, 0.5, 1.0], found)} <= {"real", "unsure", "generated"}
        json.dumps(found.low, allow_nan=False)


# File, how it is changed, what reads it as the commands do, and how often.
FILES = {
    "config.json": (changed_any, read_model_config, 9000),
    "calibration.json": (changed_any, read_all_of_calibration, 6700),
    "training_images.npy": (changed_numbers, trained_on, 4000),
    WEIGHTS: (changed_header, lambda folder: (read_extra(folder), load_model(folder)), 300),
}
assert sum(count for *_, count in FILES.values()) == 20_000


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_read_or_refused_in_one_line(name, whole, tmp_path):
    change, read, count = FILES[name]
    folder = shutil.copytree(whole / "best", tmp_path / "best")
    data, rng = (folder / name).read_bytes(), random.Random(name)
    read(folder)
    before, refused = psutil.Process().memory_info().rss, 0
    for number in range(count):
        changed = change(data, rng)
        (folder / name).write_bytes(changed)
        begin = time.process_time()
        try:
            read(folder)
        except UserError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, changed[:300]
            refused += 1
        except OSError:  # a name that the system refuses, in one line of the command
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}, {number}: {changed[:300]!r}") from error
        assert time.process_time() - begin < 1, changed[:300]
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    assert 0.2 * count < refused  # the changes are such that matter


@pytest.mark.parametrize("name", FILES)
def test_commands_end_in_one_line(name, whole, tmp_path, monkeypatch, capsys):
    """Where they do not end well."""
    monkeypatch.chdir(tmp_path)
    change, _, _ = FILES[name]
    folder = shutil.copytree(whole / "best", tmp_path / "best")
    shutil.copy(whole / "00.png", "a.png")
    data, rng = (folder / name).read_bytes(), random.Random(3)
    for words in (
        ["predict", "a.png"],
        ["evaluate", "--data", "l.csv", "--out", "o"],
        ["export", "--format", "hf"],
    ) * 2:
        (tmp_path / "l.csv").write_text("path,label\na.png,0\n")
        shutil.rmtree("o", ignore_errors=True)
        (folder / name).write_bytes(change(data, rng))
        begin = time.process_time()
        out = ["--out", "e"] if words[0] == "export" else ["--workers", "0"]
        try:
            main([*words, "--model", "best", *out])
        except SystemExit as stop:
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dgsnet: ")]
            assert stop.code == 2 and len([line for line in said if "warning" not in line]) == 1
        assert time.process_time() - begin < 10
