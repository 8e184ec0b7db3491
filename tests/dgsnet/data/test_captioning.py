"""`dgsnet caption` with a tiny BLIP: what it writes is what BLIP says, and what training finds."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import transformers
from dgsnet.data.captioning import PROMPT, Captioner, caption_command
from dgsnet.data.captions import attach_captions
from dgsnet.data.images import read_image
from dgsnet.data.items import find_samples
from dgsnet.errors import UserError
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.fresh import FORKSERVER

WORDS = [
    "a",
    "picture",
    "of",
    "cat",
    "dog",
    "house",
    "red",
    "blue",
    "tree",
    "on",
    "the",
    "with",
    "man",
    "sky",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A BLIP of random weights, large enough that images make a difference, and its tokenizer."""
    folder = tmp_path_factory.mktemp("blip")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(vocabulary), "encoder_hidden_size": 16, "max_position_embeddings": 32}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=size | words | special, vision_config=size | {"image_size": 32, "patch_size": 8}
    )
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "model")
    transformers.BlipProcessor(
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}),
        transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), bos_token="[DEC]"),
    ).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "data" / "train" / "gan" / ("0_real", "1_fake")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40 + i, 50)).save(folder / f"{i:02}.png")
    (tmp_path / "data" / "val" / "gan" / "0_real").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "val" / "gan" / "0_real" / "v.png")
    return tmp_path / "data"


def captions_of(data):
    return json.loads((data / "captions.json").read_text())


def test_captions_are_those_of_blip_and_training_finds_them(blip, data, capsys):
    caption_command(str(data), model=blip, batch_size=8, device="cpu")
    captions = captions_of(data)
    assert len(captions) == 20 and "train/gan/0_real/00.png" in captions
    assert len(set(captions.values())) > 5
    assert all(set(caption.split()) <= set(WORDS) for caption in captions.values())
    assert "20 captions, 0 images could not be read" in capsys.readouterr().out

    # The same by transformers' own pipeline of processor and model, prompt included.
    processor = transformers.BlipProcessor.from_pretrained(blip)
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval()
    images = [Image.open(data / name) for name in sorted(captions)]
    inputs = processor(images=images, text=[PROMPT] * 20, return_tensors="pt")
    tokens = model.generate(**inputs, num_beams=3, max_length=20, min_length=5)
    said = processor.batch_decode(tokens, skip_special_tokens=True)
    assert said == [f"{PROMPT}{captions[name]}".strip() for name in sorted(captions)]

    for root in (data, data / "train"):
        samples = attach_captions(
            find_samples(root, "train"), "auto" if root == data else data / "captions.json", root
        )
        assert [s.caption for s in samples] == [captions[os.path.relpath(s.path, data)] for s in samples]


def test_captions_do_not_depend_on_workers(blip, data, tmp_path):
    caption_command(str(data), str(tmp_path / "a.json"), model=blip, batch_size=3, device="cpu", workers=0)
    caption_command(str(data), str(tmp_path / "b.json"), model=blip, batch_size=3, device="cpu", workers=2)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_unreadable_images_are_told_and_do_not_stop_training(blip, data, capsys):
    broken = data / "train" / "gan" / "1_fake" / "99.png"
    broken.write_bytes(b"no image")
    caption_command(str(data), model=blip, batch_size=1, device="cpu")
    printed = capsys.readouterr()
    assert "20 captions, 1 images could not be read" in printed.out
    assert f"no caption: {broken}: not an image" in printed.err
    assert captions_of(data)["train/gan/1_fake/99.png"] == ""
    assert attach_captions(find_samples(data, "train"), "auto", data)[-1].caption == ""


def test_a_killed_run_goes_on_to_the_same_captions(blip, data, tmp_path):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    options = {"model": blip, "batch_size": 3, "device": "cpu", "workers": 1}
    caption_command(str(data), str(whole), **options)

    part = tmp_path / "out.json.partial"
    child = FORKSERVER.Process(target=caption_command, args=(str(data), str(out)), kwargs=options)
    child.start()
    while child.is_alive() and (not part.exists() or part.read_bytes().count(b"\n") < 5):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    kept = part.read_bytes()
    assert not out.exists() and 4 <= kept.count(b"\n") - 1 < 20
    # The cut is in the middle of a batch and of a line.
    part.write_bytes(kept[: kept.rstrip().rindex(b"\n") + 9])

    with pytest.raises(UserError, match="rows already: go on with --resume"):
        caption_command(str(data), str(out), **options)
    with pytest.raises(UserError, match=r"begun with other settings \(batch_size\)"):
        caption_command(str(data), str(out), resume=True, **options | {"batch_size": 4})
    caption_command(str(data), str(out), resume=True, **options)
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


def test_lists_with_captions_of_their_own_are_left_alone(blip, data, tmp_path):
    paths = [sample.path for sample in find_samples(data, "train")][:3]
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,label,caption\n{paths[0]},0,a dog\n{paths[1]},0,\n{paths[2]},1,\n")
    caption_command(str(listed), model=blip, device="cpu")
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert [os.path.normpath(tmp_path / name) for name in captions] == paths[1:]
    attached = attach_captions(find_samples(listed), "auto", listed)
    assert (
        attached[0].caption == "a dog"
        and attached[1].caption == captions[os.path.relpath(paths[1], tmp_path)]
    )


def test_what_cannot_be_done_is_one_line(blip, data, tmp_path):
    def refused(match, source=data, **options):
        with pytest.raises(UserError, match=match) as error:
            caption_command(
                str(source), str(tmp_path / "c.json"), **{"model": blip, "device": "cpu"} | options
            )
        assert "\n" not in str(error.value)

    refused("nowhere: no such file or folder", source=tmp_path / "nowhere")
    refused("batch_size is 0", batch_size=0)
    refused("device nonsense cannot be used", device="nonsense")
    (tmp_path / "empty").mkdir()
    refused("empty: cannot be loaded as BLIP", model=str(tmp_path / "empty"))
    clip = transformers.CLIPTextConfig(
        vocab_size=10, hidden_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    transformers.CLIPTextModel(clip).save_pretrained(tmp_path / "clip")
    refused("is a model of type clip_text_model, not blip", model=str(tmp_path / "clip"))
    shutil.copytree(blip, tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    save_file(kept, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    refused("tensors are missing, such as", model=str(tmp_path / "half"))
    (tmp_path / "c.json").write_text("{}")
    refused("c.json is there already")


def test_a_caption_in_python(blip, data):
    captioner = Captioner(blip, "cpu")
    image = read_image(data / "train/gan/0_real/00.png")
    pixels = captioner.prepare(image)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert captioner(pixels[None]) == captioner(pixels[None]) != [""]


@pytest.mark.parametrize(
    "file, kind", [("config.json", "AutoConfig"), ("processor_config.json", "AutoProcessor")]
)
def test_code_in_a_models_folder_is_not_run_and_nobody_is_asked(
    blip, data, tmp_path, monkeypatch, capsys, file, kind
):
    folder, mark = tmp_path / "strange", tmp_path / "mark"
    shutil.copytree(blip, folder)
    code = {"auto_map": {kind: "strange.Strange", "AutoImageProcessor": "strange.Strange"}}
    config = json.loads((folder / file).read_text()) | code
    if kind == "AutoConfig":
        config["model_type"] = "strange"
    else:
        config["image_processor"] |= {"image_processor_type": "Strange"} | code
    (folder / file).write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Strange: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be loaded as BLIP"):
        caption_command(str(data), str(tmp_path / "new.json"), str(folder), workers=0)
    assert not mark.exists() and "custom code" not in capsys.readouterr().out
