"""`dgsnet twins`: what it writes is a dataset of pairs, the same bytes whatever happened on the way."""

import csv
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import read_image
from dgsnet.data.items import find_items, find_samples
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.data.tables import Table
from dgsnet.detection.batches import fast_precision
from PIL import Image

from tests.dgsnet.test_no_code import Mark
from tests.dgsnet.twins.conftest import crops


def call(*words, code=0):
    try:
        main(["twins", *map(str, words)])
    except SystemExit as stop:
        assert stop.code == code
    else:
        assert not code


def refused(capsys, *words):
    call(*words, code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("dgsnet: ")
    return said


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(out):
    with open(out / "twins.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def photos(tmp_path):
    """Files of the same names in two folders, one of which cannot be read, some of one size."""
    for number, image in enumerate(crops(9, low=55)):
        image = image.crop((0, 0, 55, 51)) if number > 2 else image
        path = tmp_path / "photos" / ("north", "south")[number % 2] / f"{number // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    Image.new("RGB", (1, 1), (9, 80, 200)).save(tmp_path / "photos" / "south" / "one.png")
    (tmp_path / "photos" / "north" / "1.png").write_bytes(b"\x89PNG no")
    return tmp_path / "photos"


def test_a_dataset_of_pairs(photos, tmp_path, capsys):
    out = tmp_path / "out"
    with tarfile.open(photos / "shard.tar", "w") as shard:
        shard.add(photos / "south" / "one.png", "deep/one.png")
    (photos / "south" / "one.png").unlink()
    words = ["--data", photos, photos / "shard.tar", "--out", out, "--seed", "5"]
    call(*words, "--by", "builtin:shuffle", "resize")
    said = capsys.readouterr().out
    made = [row["by"] for row in rows(out) if not row["error"]]
    assert {"builtin-shuffle", "resize"} == set(made) and len(made) == 9
    shuffled = made.count("builtin-shuffle")
    assert f"9 pairs ({shuffled} by builtin-shuffle, {9 - shuffled} by resize), 1 without a twin; " in said
    assert "images per second" in said
    [bad] = [row for row in rows(out) if row["error"]]
    assert bad["source"] == str(photos / "north" / "1.png") and bad["source"] in bad["error"]
    assert not bad["path"] and not bad["twin"]

    samples = attach_twins(find_samples(out), out)
    assert len(find_pairs(samples)) == 9 and len(samples) == 18
    for row in rows(out):
        if row["error"]:
            continue
        [source] = find_items([row["source"].removesuffix("/deep/one.png")])
        source, real, twin = source.read(), read_image(out / row["path"]), read_image(out / row["twin"])
        assert np.array_equal(real, source) and twin.shape == source.shape
        # Alike, and yet another image; of a single pixel, nothing is left to change.
        difference = np.abs(twin.astype(int) - source).mean()
        assert 0 < difference < 20 if source.size > 3 else difference < 12
        assert (row["by"], "1_fake") == tuple(row["twin"].split("/")[:2])


def test_reals_of_a_labelled_dataset_and_their_captions(tmp_path, capsys):
    texts = {}
    for number, image in enumerate(crops(5)):
        name = f"{('0_real', '1_fake')[number == 3]}/{number}.png"
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if number != 1:
            texts[name] = f"picture {number}"
    (tmp_path / "data" / "captions.json").write_text(json.dumps(texts))
    out = tmp_path / "out"
    call("--data", tmp_path / "data", "--out", out, "--by", "resize", "--captions", "auto")
    assert "its 4 real images are taken, its 1 generated ones are not" in capsys.readouterr().out
    samples = attach_captions(find_samples(out), "auto", out, partly=True)
    found = [(sample.label, sample.caption) for sample in samples]
    words = ["picture 0", None, "picture 2", "picture 4"]
    assert found == [(label, text) for label in (0, 1) for text in words]


@pytest.mark.parametrize("name", ["sure", "tiny"])
def test_a_twin_is_what_the_autoencoder_makes_of_its_image(name, autoencoders, tmp_path):
    """Compared with diffusers called by hand; the image is mirrored up to sides that fit, and cut again."""
    import diffusers

    [image] = [crop.crop((0, 0, 45, 51)) for crop in crops(1, low=60)]
    image.save(tmp_path / "a.png")
    call("--data", tmp_path / "a.png", "--out", tmp_path / "out", "--by", f"vae:{autoencoders / name}")
    [row] = rows(tmp_path / "out")
    assert row["by"] == f"vae-{name}"
    kind, folder = ("AutoencoderTiny", "tiny") if name == "tiny" else ("AutoencoderKL", "sure/vae")
    dtype = torch.bfloat16 if fast_precision(torch.device("cpu")) == "bf16" else torch.float32
    vae = getattr(diffusers, kind).from_pretrained(autoencoders / folder, torch_dtype=dtype)
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    assert height % 4 and width % 4
    padded = np.pad(pixels, ((0, -height % 4), (0, -width % 4), (0, 0)), "reflect")
    given = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.inference_mode():
        code = vae.encode(given.to(dtype))
        made = vae.decode(code.latents if name == "tiny" else code.latent_dist.mode()).sample
    expected = ((made[0].float().permute(1, 2, 0) + 1) * 127.5).clamp(0, 255)[:height, :width].numpy()
    found = read_image(tmp_path / "out" / row["twin"])
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 3


def test_what_is_drawn_hangs_on_seed_and_image_alone(autoencoders, tmp_path):
    """Not on names, order, batches or workers."""
    for number, image in enumerate(crops(5)):
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{number}.png")
        image.save(tmp_path / "again" / f"{9 - number}.png")
    by = ["--by", f"vae:{autoencoders / 'kl'}", "builtin:nearest"]
    for name, words in {
        "photos": ["--batch_size", "3"],
        "again": ["--batch_size", "1", "--workers", "2"],
        "other": ["--seed", "1"],
    }.items():
        data = tmp_path / (name if name != "other" else "photos")
        call("--data", data, "--out", tmp_path / f"of {name}", *by, *words)
    first, again, other = (rows(tmp_path / f"of {name}") for name in ("photos", "again", "other"))
    assert [row["by"] for row in first] == [row["by"] for row in again[::-1]]
    assert len({row["by"] for row in first}) == 2
    read = [
        [read_image(tmp_path / f"of {name}" / row["twin"]) for row in found]
        for name, found in (("photos", first), ("again", again[::-1]), ("other", other))
    ]
    # The last bits of sums hang on what else is in a batch.
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(read[0], read[1]))
    drawn = [place for place in range(5) if first[place]["by"] == other[place]["by"] == "vae-kl"]
    assert drawn and not any(np.array_equal(read[0][place], read[2][place]) for place in drawn)


def test_killed_anywhere_and_resumed_it_is_the_same_bytes(
    photos, autoencoders, tmp_path, monkeypatch, capsys
):
    words = ["--data", photos, "--by", f"vae:{autoencoders / 'kl'}", f"vae:{autoencoders / 'tiny'}"]
    words += ["--batch_size", "1", "--out"]
    call(*words, tmp_path / "whole")
    whole, out = files(tmp_path / "whole"), tmp_path / "out"
    real = Table.add
    for stop in (0, 3, 8):
        counted = []

        def add(table, row, counted=counted, stop=stop):
            if len(counted) == stop:
                raise KeyboardInterrupt
            counted.append(row)
            real(table, row)

        shutil.rmtree(out, ignore_errors=True)
        monkeypatch.setattr(Table, "add", add)
        call(*words, out, code=130)
        monkeypatch.setattr(Table, "add", real)
        assert not (out / "twins.csv").exists()
        # What a kill leaves of a file, and of a line.
        counts = {row[kind] for row in counted for kind in ("path", "twin")}
        undone = next(name for name in sorted(whole) if name not in counts and name.endswith(".png"))
        for name in (out / undone, (out / undone).with_name(f".{(out / undone).name}.new")):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(b"half")
        with open(out / "twins.csv.partial", "ab") as file:
            file.write(b'{"number": 1')
        capsys.readouterr()
        if stop:
            assert "--resume" in refused(capsys, *words, out)
        call(*words, out, "--resume")
        assert files(out) == whole
    capsys.readouterr()
    assert "not an empty folder" in refused(capsys, *words, out, "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert "not an empty folder" in refused(capsys, *words, tmp_path / "other")
    assert files(tmp_path / "other").keys() == {"mine.txt"}


def test_a_large_image_goes_through_in_tiles_without_seams(autoencoders, tmp_path, monkeypatch):
    """AutoencoderTiny sees a little of an image at a time, so tiles change nothing."""
    [image] = crops(1, low=118)
    image.resize((370, 290)).save(tmp_path / "a.png")
    words = ["--data", tmp_path / "a.png", "--by"]
    call(*words, f"vae:{autoencoders / 'tiny'}", "--out", tmp_path / "tiny")
    call(*words, f"vae:{autoencoders / 'kl'}", "--out", tmp_path / "kl")
    whole = files(tmp_path / "tiny"), files(tmp_path / "kl")
    monkeypatch.setattr("dgsnet.twins.makers.LARGE", 300 * 300)
    monkeypatch.setattr("dgsnet.twins.makers.TINY_TILE", 400)
    call(*words, f"vae:{autoencoders / 'tiny'}", "--out", tmp_path / "tiny in tiles")
    call(*words, f"vae:{autoencoders / 'kl'}", "--out", tmp_path / "kl in tiles")
    tiles = files(tmp_path / "tiny in tiles"), files(tmp_path / "kl in tiles")
    name = "{}/1_fake/000000.png"
    tiny, tiny_tiles = (read_image(found[0][name.format("vae-tiny")]).astype(int) for found in (whole, tiles))
    assert np.abs(tiny - tiny_tiles).max() <= 2 and tiny.std() > 3
    kl, kl_tiles = (read_image(found[1][name.format("vae-kl")]).astype(int) for found in (whole, tiles))
    assert kl.shape == kl_tiles.shape == (290, 370, 3)
    # AutoencoderKL's attention sees all of a tile.
    assert (kl != kl_tiles).any()


def test_an_autoencoder_of_the_hub_is_told_with_its_revision(autoencoders, tmp_path, monkeypatch, capsys):
    """From the hub's own cache, without a network; what is not there needs one."""
    revision = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--some--tiny"
    shutil.copytree(autoencoders / "tiny", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    next(crops(1)).save(tmp_path / "a.png")
    words = ["--data", tmp_path / "a.png", "--out"]
    call(*words, tmp_path / "out", "--by", "vae:some/tiny")
    assert f"some/tiny: revision {revision}\n" in capsys.readouterr().out
    call(*words, tmp_path / "pinned", "--by", f"vae:some/tiny@{revision}")
    assert files(tmp_path / "pinned") == files(tmp_path / "out")
    assert rows(tmp_path / "out")[0]["by"] == "vae-some-tiny"
    capsys.readouterr()
    for name in ("some/other", f"some/tiny@{revision[::-1]}", "no folder at all"):
        assert "give a folder that holds one, or a network" in refused(
            capsys, *words, tmp_path / "new", "--by", f"vae:{name}"
        )


def test_other_folders_are_refused_in_one_line(autoencoders, tmp_path, monkeypatch, capsys):
    next(crops(1)).save(tmp_path / "a.png")
    tiny = autoencoders / "tiny"

    def folder(name, **changes):
        shutil.copytree(tiny, tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return tmp_path / name

    mark = tmp_path / "mark"
    pickled, disguised = folder("pickled"), folder("disguised")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "diffusion_pytorch_model.bin")
    torch.save(Mark(mark), disguised / "diffusion_pytorch_model.safetensors")
    cut = folder("cut")
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    expected = {
        f"vae:{pickled}": "pickled weights, which can run code, are not read",
        f"vae:{disguised}": "cannot be loaded as AutoencoderTiny",
        f"vae:{cut}": "cannot be loaded as AutoencoderTiny",
        f"vae:{folder('vq', _class_name='VQModel')}": "holds a VQModel; --by vae: takes AutoencoderKL and",
        f"vae:{folder('deep', num_decoder_blocks=[1, 2, 1])}": "are missing",
        f"vae:{folder('wide', latent_channels=5)}": "cannot be loaded",
        f"vae:{tmp_path / 'empty'}": "has no config.json of an autoencoder",
        f"vae:{tiny} --device cuda:77": "device cuda:77 cannot be used here",
        f"vae:{tiny} --batch_size 0": "batch_size is 0; it must be 1 or more",
        f"vae:{tiny} --seed -1": "seed is -1; it must be 0 or more",
        f"vae:{tiny} vae:{tiny}": "--by names one twice",
        f"vae:{tiny} vae:{tiny}/../tiny": "would both be called vae-tiny",
        "vae:": "--by vae: is unknown; give vae:NAME_OR_FOLDER, builtin:DECODER or resize",
        "builtin:gan": "the built-in decoders are nearest, transposed",
    }
    for words, problem in expected.items():
        said = refused(
            capsys, "--data", tmp_path / "a.png", "--out", tmp_path / "new", "--by", *words.split()
        )
        assert problem in said, said
        assert not (tmp_path / "new").exists() and not mark.exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = ["--data", tmp_path / "a.png", "--out", tmp_path / "new", "--by", f"vae:{tiny}"]
    assert "pip install 'dgs-kernels[twins]'" in refused(capsys, *words)


def test_nothing_that_can_be_read(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"words")
    words = ["--data", tmp_path / "a.png", "--by", "resize", "--out", tmp_path / "out"]
    assert "no image has a twin" in refused(capsys, *words)
    assert rows(tmp_path / "out")[0]["error"].startswith(f"{tmp_path / 'a.png'}: not an image")
