"""Files of the published layout convert to models that score as a plain computation from the file does."""

import hashlib
import math
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from dgsnet.cli import main
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.exchange.convert import PUBLISHED, convert, read
from dgsnet.model.catalogue import BUILTIN_FOLDER
from dgsnet.model.checkpoint import load_model, read_extra
from safetensors.torch import load_file

from tests.support.tiny import add_quick_gelu

NAME, QUICK = "dgsnet-tiny", "tiny-quickgelu"
RANK, ALPHA = 3, 6.0
LETTERS = "qkv"


@pytest.fixture(scope="module", autouse=True)
def quick_gelu(tmp_path_factory):
    add_quick_gelu(tmp_path_factory.mktemp("clip"), QUICK)
    open_clip.add_model_config(BUILTIN_FOLDER / f"{NAME}.json")


def official(name, *, stage=2, merged=False, trained=True):
    """A checkpoint in the published layout, with random weights: a flat state_dict."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    clip = {k: torch.randn_like(v) * 0.2 for k, v in open_clip.CLIP(**config).state_dict().items()}
    # The published base weights are OpenAI's half-precision ones.
    clip = {k: v.half().float() for k, v in clip.items()}
    dim = config["embed_dim"]

    def head(prefix):
        return {f"{prefix}.weight": torch.randn(1, dim), f"{prefix}.bias": torch.randn(1)}

    teacher = {f"clip_model_frozen.{k}": v for k, v in clip.items()} | head("img_frozen_fc")
    if stage == 1:
        return teacher
    student = {}
    for key, value in clip.items():
        if key.startswith("visual.") and ".attn.in_proj_" in key:
            block, kind = key.split("in_proj_")
            width = len(value) // 3
            for i, letter in enumerate(LETTERS):
                target = f"clip_model.{block}{letter}_proj"
                part = value[i * width : (i + 1) * width].clone()
                if kind == "weight":
                    a = torch.randn(RANK, width) / math.sqrt(width)
                    b = torch.randn(width, RANK) * (0.3 if trained else 0)
                    student |= {f"{target}.w_lora_A": a, f"{target}.w_lora_B": b}
                    part += ALPHA / math.sqrt(RANK) * (b @ a) * merged
                student[f"{target}.{kind}"] = part
        else:
            renamed = key.replace("attn.out_proj", "attn.proj") if key.startswith("visual.") else key
            student[f"clip_model.{renamed}"] = value.clone()
    teacher = {f"clip_model_frozen.{k}": v for k, v in teacher.items()}
    return student | teacher | head("img_fc") | head("text_fc")


def plain_logits(state, pixels, *, name, student, merged=False):
    """The logits as the published formulas have them, from the file's tensors alone, in float64."""
    config = open_clip.get_model_config(name)
    width, heads = (
        config["vision_cfg"]["width"],
        config["vision_cfg"]["width"] // config["vision_cfg"].get("head_width", 64),
    )
    start = "clip_model." if student else "clip_model_frozen."
    if not student and f"{start}{start}logit_scale" in state:
        start += start
    w = {
        k.removeprefix(f"{start}visual."): v.double()
        for k, v in state.items()
        if k.startswith(f"{start}visual.")
    }

    def norm(x, key):
        return F.layer_norm(x, (width,), w[f"{key}.weight"], w[f"{key}.bias"])

    def projections(block, x):
        if not student:
            return F.linear(x, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]).chunk(
                3, -1
            )
        result = []
        for letter in LETTERS:
            key = f"{block}.attn.{letter}_proj"
            weight = w[f"{key}.weight"]
            if not merged:
                weight = weight + ALPHA / RANK**0.5 * w[f"{key}.w_lora_B"] @ w[f"{key}.w_lora_A"]
            result.append(F.linear(x, weight, w[f"{key}.bias"]))
        return result

    def gelu(x):
        return x * torch.sigmoid(1.702 * x) if config.get("quick_gelu") else F.gelu(x)

    x = F.conv2d(pixels.double(), w["conv1.weight"], stride=config["vision_cfg"]["patch_size"]).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for i in range(config["vision_cfg"]["layers"]):
        block, out = f"transformer.resblocks.{i}", "proj" if student else "out_proj"
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in projections(block, norm(x, f"{block}.ln_1"))
        )
        attention = (q @ k.mT / math.sqrt(width // heads)).softmax(-1) @ v
        attention = attention.transpose(1, 2).flatten(2)
        x = x + F.linear(attention, w[f"{block}.attn.{out}.weight"], w[f"{block}.attn.{out}.bias"])
        hidden = gelu(
            F.linear(norm(x, f"{block}.ln_2"), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        )
        x = x + F.linear(hidden, w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    features = norm(x[:, 0], "ln_post") @ w["proj"]
    head = "img_fc" if student else "img_frozen_fc" if "img_frozen_fc.weight" in state else None
    head = head or "clip_model_frozen.img_frozen_fc"
    return (features @ state[f"{head}.weight"].double().T + state[f"{head}.bias"].double()).squeeze(1)


def pixels_of(name):
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def close(ours, expected):
    torch.testing.assert_close(ours.double(), expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [NAME, QUICK])
@pytest.mark.parametrize("merged", [False, True])
def test_a_detector_scores_as_the_published_forward(tmp_path, capsys, name, merged):
    state = official(name, merged=merged)
    torch.save(state, tmp_path / "model_epoch_step2.pth")
    main(["convert", str(tmp_path / "model_epoch_step2.pth"), "--out", str(tmp_path / "run"), "--name", name])
    assert f"LoRA of rank 3, {'merged' if merged else 'not merged'} in" in capsys.readouterr().out

    pixels = pixels_of(name)
    expected = plain_logits(state, pixels, name=name, student=True, merged=merged)
    teacher = plain_logits(state, pixels, name=name, student=False)
    # Adapters and heads matter here.
    assert (expected - teacher).abs().min() > 0.05
    detector = Detector.load(tmp_path / "run", device="cpu")
    close(detector.logits(pixels), expected)
    with torch.no_grad():
        close(detector.model.teacher_logits(pixels), teacher)
        torch.testing.assert_close(
            detector.model.head.text_head.weight, state["text_fc.weight"], rtol=0, atol=0
        )
    assert (
        detector.config.preprocess.normalization == "imagenet"
        and detector.config.preprocess.mode == "patches"
    )
    assert detector.config.preprocess.patch_size == 32
    assert read_extra(tmp_path / "run") == {
        "source": "model_epoch_step2.pth",
        "sha256": hashlib.sha256((tmp_path / "model_epoch_step2.pth").read_bytes()).hexdigest(),
        "stage": 2,
        "merged": merged,
    }


def test_merged_and_unmerged_files_give_the_same_model_to_the_bit(tmp_path):
    for merged in (False, True):
        torch.save(official(NAME, merged=merged), tmp_path / "c.pth")
        convert(tmp_path / "c.pth", tmp_path / f"{merged}", name=NAME)
    a, b = (load_file(tmp_path / f"{merged}" / "adapters.safetensors") for merged in (False, True))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "False/clip.safetensors").read_bytes() == (
        tmp_path / "True/clip.safetensors"
    ).read_bytes()


def test_one_clip_is_kept_and_in_half_precision_where_that_loses_nothing(tmp_path):
    state = official(NAME)
    state["clip_model.visual.proj"] = state["clip_model_frozen.clip_model_frozen.visual.proj"] = torch.full(
        (96, 96), 1 / 3
    )
    torch.save(state, tmp_path / "c.pth")
    convert(tmp_path / "c.pth", tmp_path / "run", name=NAME)
    clip = load_file(tmp_path / "run" / "clip.safetensors")
    assert sorted((tmp_path / "run").iterdir()) == [
        tmp_path / "run" / name for name in ("adapters.safetensors", "clip.safetensors", "config.json")
    ]
    for key, tensor in clip.items():
        original = state[f"clip_model_frozen.clip_model_frozen.{key}"]
        assert torch.equal(tensor.float(), original)
        assert tensor.dtype == (torch.float32 if key == "visual.proj" else torch.float16)
    assert (tmp_path / "run" / "clip.safetensors").stat().st_size < (tmp_path / "c.pth").stat().st_size / 3.5
    # The folder can be moved, and the text tower is there to train on.
    (tmp_path / "run").rename(tmp_path / "moved")
    model, config = load_model(tmp_path / "moved", with_text=True)
    assert config.model.pretrained == str(tmp_path / "moved" / "clip.safetensors")
    assert torch.equal(model.text.ln_final.weight, state["clip_model.ln_final.weight"])
    (tmp_path / "moved" / "clip.safetensors").unlink()
    with pytest.raises(UserError, match=r"clip\.safetensors is missing"):
        load_model(tmp_path / "moved")


def test_stage_1_is_the_linear_head_on_the_frozen_encoder(tmp_path, capsys):
    state = official(NAME, stage=1)
    # The authors have used this name too.
    torch.save(state, tmp_path / "model_epoch_stage1.pth")
    main(
        ["convert", str(tmp_path / "model_epoch_stage1.pth"), "--out", str(tmp_path / "run"), "--name", NAME]
    )
    assert "stage 1" in capsys.readouterr().out
    detector = Detector.load(tmp_path / "run", device="cpu")
    pixels = pixels_of(NAME)
    expected = plain_logits(state, pixels, name=NAME, student=False)
    close(detector.logits(pixels), expected)
    assert detector.config.model.lora_rank == 0 and detector.config.surgery.mode == "none"


@pytest.mark.parametrize(
    "mixed, merged",
    [("resblocks.1.attn.", False), ("resblocks.0.attn.k_proj.", True), ("resblocks.0.attn.q_proj.", False)],
)
def test_half_merged_files_are_refused(tmp_path, mixed, merged):
    state, other = official(NAME, merged=merged), official(NAME, merged=not merged)
    weights = [key for key in state if mixed in key and key.endswith("_proj.weight") and "frozen" not in key]
    assert weights
    torch.save(state | {key: other[key] for key in weights}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="not the one that it is in the blocks before"):
        read(tmp_path / "c.pth", name=NAME, alpha=ALPHA)


def test_a_published_file_is_recognised(tmp_path, capsys, monkeypatch):
    (published,) = PUBLISHED
    assert published == "89b96a586a6b9f2e5626b03aa27e8063bbe6aaae00f4d0cf97fd3ced2379c216"
    torch.save(official(NAME), tmp_path / "c.pth")
    own = hashlib.sha256((tmp_path / "c.pth").read_bytes()).hexdigest()
    command = ["convert", str(tmp_path / "c.pth"), "--name", NAME, "--out"]
    main([*command, str(tmp_path / "other")])
    assert f"SHA-256 {own}: not a published file known here" in capsys.readouterr().out
    monkeypatch.setitem(PUBLISHED, own, PUBLISHED[published])
    main([*command, str(tmp_path / "published")])
    assert f"SHA-256 {own}: the authors' detector (stage 2)" in capsys.readouterr().out


def test_adapters_that_were_never_trained_count_as_not_merged(tmp_path):
    torch.save(official(NAME, trained=False), tmp_path / "c.pth")
    assert not read(tmp_path / "c.pth", name=NAME, alpha=ALPHA).merged


def test_the_published_settings_are_the_default():
    from dgsnet.config import Config, PreprocessConfig
    from dgsnet.exchange.official import Official, config_of

    config = config_of("ViT-L-14-quickgelu", "x", Official({}, {}, {}, rank=6, stage=2, merged=False), 6.0)
    assert config.preprocess == PreprocessConfig() == PreprocessConfig("patches", 224, 32, 49, "imagenet")
    assert config.model.name == Config().model.name and config.model.lora_alpha == 6


def _pickled_call(path):
    class Call:
        def __reduce__(self):
            return print, ("executed",)

    path.write_bytes(pickle.dumps({"a": Call()}))


KEY = "clip_model.visual.transformer.resblocks.1.attn.k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("img_fc.bias"), r"img_fc\.bias is missing"),
        (lambda s: s.pop(f"{KEY}.w_lora_B"), r"1\.attn\.k_proj\.w_lora_B is missing"),
        (lambda s: s.update({"more.weight": torch.ones(2)}), r"more\.weight is unknown"),
        (lambda s: s.update({f"{KEY}.w_lora_A": torch.ones(4, 96)}), r"shape \[4, 96\], expected \[3, 96\]"),
        (
            lambda s: s.update({f"{KEY.replace('1.attn.k', '0.attn.q')}.w_lora_A": torch.ones(96)}),
            r"shape \[96\], expected \[r, 96\]",
        ),
        # A shape of a terabyte costs nothing to claim.
        (
            lambda s: s.update({f"{KEY}.weight": torch.ones(1).expand(10**6, 10**6)}),
            r"shape \[1000000, 1000000\]",
        ),
        (lambda s: s.update({f"{KEY}.bias": torch.full((96,), torch.nan)}), "not finite"),
        (lambda s: s[f"{KEY}.weight"].mul_(1.01), r"1\.attn\.k_proj\.weight is neither .*alpha"),
        (lambda s: s["clip_model.visual.proj"].add_(1), r"visual\.proj differs from the teacher's"),
        (lambda s: s[f"{KEY}.bias"].add_(1), r"k_proj\.bias differs from the teacher's"),
        (lambda s: s.update({f"{KEY}.bias": torch.ones(96, dtype=torch.int64)}), r"is a torch\.int64 tensor"),
        (lambda s: s.update({"epoch": 3}), "'epoch' is int"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("clip_model_frozen")], "lacks the teacher"),
        (lambda s: [s.pop(k) for k in list(s) if "w_lora" in k], "w_lora_A is missing"),
    ],
)
def test_a_file_of_another_layout_is_refused_in_one_line(tmp_path, change, message):
    state = official(NAME)
    change(state)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path / "c.pth", tmp_path / "run", name=NAME)
    assert "\n" not in str(error.value) and "c.pth" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_another_clip_or_scaling_is_refused(tmp_path):
    torch.save(official(NAME, merged=True), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"no checkpoint of DGS-Net on tiny-quickgelu: .*expected \[1, 24\]"):
        convert(tmp_path / "c.pth", tmp_path / "run", name=QUICK)
    with pytest.raises(UserError, match="alpha is another"):
        convert(tmp_path / "c.pth", tmp_path / "run", name=NAME, alpha=1.0)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "no file"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: p.write_bytes(b"PK\3\4 no archive"), "cannot be read"),
        (lambda p: torch.save([torch.ones(2)], p), "holds list"),
        (lambda p: torch.save({}, p), "holds dict"),
        (_pickled_call, "cannot be read"),
        (lambda p: torch.save({"a": torch.eye(2).to_sparse()}, p), "expected a dense tensor"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_in_one_line(tmp_path, capsys, write, message):
    write(tmp_path / "c.pth")
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "c.pth"), "--out", str(tmp_path / "run"), "--name", NAME])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.err and printed.err.count("\n") == 1
    assert "executed" not in printed.out and not (tmp_path / "run").exists()


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(official(NAME), tmp_path / "c.pth")
    data = (tmp_path / "c.pth").read_bytes()
    for keep in (100, len(data) // 2, len(data) - 50):
        (tmp_path / "c.pth").write_bytes(data[:keep])
        with pytest.raises(UserError, match="cannot be read as weights"):
            convert(tmp_path / "c.pth", tmp_path / "run", name=NAME)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        convert(tmp_path / "c.pth", tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
