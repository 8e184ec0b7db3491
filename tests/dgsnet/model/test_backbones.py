"""Every family of image towers against its own library, and one training step against the naive algorithm."""

import copy
import functools
import math
import re
from functools import partial

import open_clip
import pytest
import timm
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.preprocess import NORMALIZATIONS
from dgsnet.errors import UserError
from dgsnet.model import checkpoint, pretrained
from dgsnet.model.adapters import Adapter, merge_adapters
from dgsnet.model.backbones import Timm, backbone_of
from dgsnet.model.catalogue import TIMM, check_tower, has_text, own_settings
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.step import TRAIN_COLUMNS
from safetensors.torch import save_file
from timm.layers import Attention, AttentionRope, LayerNorm
from timm.models.eva import EvaAttention

from tests.support import official, towers
from tests.support.tiny_clip import step

CAPTIONS = ["a dog", "a very blurred photograph of a cat"]
TARGETS = {
    "qkv": ("q", "k", "v"),
    "qkvo": ("q", "k", "v", "o"),
    "mlp": ("m",),
    "all": ("q", "k", "v", "o", "m"),
}


WEIGHTS = {}


@pytest.fixture(scope="module", autouse=True)
def nano(tmp_path_factory):
    WEIGHTS.update(towers.register(tmp_path_factory.mktemp("configs")))


@functools.cache
def untouched(name):
    return towers.Untouched(name)


def settings(name, **options):
    return ModelConfig(name=name, pretrained=str(WEIGHTS[name]), lora_dropout=0.0, **options)


def build(name, with_text=False, **options):
    torch.manual_seed(0)
    return DGSNet(settings(name, **options), with_text=with_text)


def randomised(model, scale=0.2):
    """B starts at zero, where student and teacher agree."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def pixels_for(model, count=3):
    size = model.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", towers.NAMES)
def test_features_are_the_librarys_own(name):
    model, own = build(name, lora_targets="all"), untouched(name)
    pixels = pixels_for(model)
    expected = own.visual(pixels)
    assert expected.shape == (3, model.dim) and (expected[0] - expected[1]).abs().max() > 0.01
    # Nothing in a tower is random in training.
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            assert difference(model.student_features(pixels), expected) < 1e-5
        assert difference(model.teacher_features(pixels), expected) < 1e-5


def test_dinov3_is_its_class_token():
    model = build(towers.DINOV3)
    pixels = pixels_for(model)
    expected = untouched(towers.DINOV3).visual.forward_features(pixels)[:, 0]
    assert difference(model.teacher_features(pixels), expected) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        partial(Attention, 32, 4, qkv_bias=False),
        partial(Attention, 32, 4, qkv_bias=True, qk_norm=True, norm_layer=LayerNorm, gated=True),
        partial(AttentionRope, 32, 4, qkv_bias=True, num_prefix_tokens=0),
        partial(AttentionRope, 32, 4, qkv_bias=False, num_prefix_tokens=0),
        partial(EvaAttention, 32, 4, qkv_bias=True, num_prefix_tokens=0, scale_norm=False),
        partial(EvaAttention, 32, 4, qkv_bias=False, num_prefix_tokens=0, norm_layer=LayerNorm),
    ],
)
def test_timms_attention_is_split_and_fused_without_a_change(make):
    fused, x, kwargs = make(), torch.randn(2, 5, 32), {}
    if make.func is not Attention:
        kwargs["rope"] = torch.randn(5, 2 * 8)
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected, state = fused(x, **kwargs), {f"0.{key}": t.clone() for key, t in fused.state_dict().items()}
    split = Timm.split(None, fused)
    assert difference(split(x, **kwargs), expected) < 1e-5 and split.qkv is None
    found = {f"0.{key}": t for key, t in split.state_dict().items()}
    for kind in ("weight", "bias"):
        names = [f"0.{letter}_proj.{kind}" for letter in "qkv"]
        if parts := [found.pop(name) for name in names if name in found]:
            found |= Timm.fuse(None, "0.", kind, parts)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("name", towers.NAMES)
def test_adapters_move_the_student_and_not_the_teacher(name):
    model = randomised(build(name, lora_targets="all"))
    pixels = pixels_for(model)
    expected = untouched(name).visual(pixels)
    student = model.student_features(pixels).detach()
    assert difference(model.teacher_features(pixels), expected) < 1e-5
    assert difference(student, expected) > 0.05
    # The tower's own forward has the adapters too.
    assert difference(model.visual(pixels).detach(), student) < 1e-5


@pytest.mark.parametrize("name", towers.NAMES)
@pytest.mark.parametrize("which", TARGETS)
def test_targets_are_the_linears_of_every_block(name, which):
    model = build(name, lora_targets=which)
    kinds = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o", "proj": "o"}
    for block in model.backbone.blocks:
        found = {n for n, module in block.named_modules() if isinstance(module, Adapter)}
        linears = {
            n.removesuffix(".base_layer")
            for n, m in block.named_modules()
            if isinstance(m, torch.nn.Linear) and "lora_" not in n
        }
        kind = {n: "m" if n.startswith("mlp.") else kinds[n.rpartition(".")[2]] for n in linears}
        assert found == {n for n in linears if kind[n] in TARGETS[which]} and set(kind.values()) == set(
            "qkvom"
        )
    adapted = [m for m in model.visual.modules() if isinstance(m, Adapter)]
    assert len(adapted) == sum(
        isinstance(m, Adapter) for block in model.backbone.blocks for m in block.modules()
    )


@pytest.mark.parametrize("which, order", [("qkv", "align_first"), ("all", "project_first")])
@pytest.mark.parametrize("name", towers.NAMES)
def test_step_equals_the_naive_algorithm(name, which, order):
    student = copy.deepcopy(untouched(name)).double()
    frozen = copy.deepcopy(student)
    model = randomised(build(name, has_text(name), lora_targets=which)).double()
    lora = {key: tensor.clone().requires_grad_() for key, tensor in model.adapter_state().items()}
    captions = CAPTIONS if has_text(name) else None
    tokens = open_clip.get_tokenizer(name)(CAPTIONS) if captions else None
    pixels, labels = pixels_for(model, 2).double(), torch.tensor([0.0, 1.0], dtype=torch.double)
    heads = {
        kind: copy.deepcopy(getattr(model.head, f"{kind}_head")) for kind in ("image", "teacher", "text")
    }
    scaling = model.config.lora_alpha / math.sqrt(model.config.lora_rank)
    expected = official.step(student, frozen, lora, scaling, heads, pixels, tokens, labels, order=order)

    found = step(model, pixels, captions, labels, order=order, alignment=0.2)
    found.loss.backward()
    losses = dict(zip(TRAIN_COLUMNS, found.values))
    gradients = {key.replace(".default", ""): p.grad for key, p in model.visual.named_parameters()}
    kinds = ("image", "text") if captions else ("image",)
    pairs = [(losses[f"{kind}_loss"], expected[kind]) for kind in (*kinds, "alignment")]
    pairs += [(getattr(model.head, f"{kind}_head").weight.grad, heads[kind].weight.grad) for kind in kinds]
    pairs += [(gradients[key], lora[key].grad) for key in lora]
    for ours, reference in pairs:
        assert reference.abs().max() > 0
        assert difference(ours.detach(), reference.detach()) < 1e-9


@pytest.mark.parametrize("name", towers.NAMES)
def test_merged_weights_fit_the_librarys_own_tower(name):
    model = randomised(build(name, lora_targets="all"))
    pixels = pixels_for(model)
    expected = model.student_features(pixels).detach()
    merge_adapters(model.visual)
    own = pretrained.untouched_tower(name).eval()
    own.load_state_dict(model.backbone.state(), assign=True)
    assert difference(own(pixels).detach(), expected) < 1e-5
    assert not any(isinstance(module, Adapter) for module in model.visual.modules())


@pytest.mark.parametrize("name", towers.NAMES)
def test_model_folders_load_to_the_same_scores(tmp_path, name):
    config = Config(
        model=settings(name, lora_targets="all"), preprocess=PreprocessConfig(mode="crop", image_size=32)
    )
    model = randomised(checkpoint.build_model(config, with_text=False)).eval()
    pixels = pixels_for(model)
    checkpoint.save_model(tmp_path / "model", model, config)
    loaded, _ = checkpoint.load_model(tmp_path / "model")
    assert torch.equal(loaded.logits(pixels), model.logits(pixels))

    other = checkpoint.build_model(Config(model=ModelConfig(name=name, pretrained="")), with_text=False)
    assert checkpoint.fingerprint(other) != checkpoint.fingerprint(model) == checkpoint.fingerprint(loaded)


@pytest.mark.parametrize("name", towers.NAMES)
def test_half_precision_and_checkpointing(name):
    model = randomised(build(name, lora_targets="all"))
    pixels, labels = pixels_for(model), torch.tensor([0.0, 1.0, 0.0])
    gradients, calls = [], []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        step(model, pixels, None, labels).loss.backward()
        gradients.append([p.grad for p in model.visual.parameters() if p.requires_grad])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients))
    # Teacher and student run once each; with checkpoints the student runs once more in backward.
    assert len(calls) == 2 + 3
    expected = model.student_features(pixels).detach()
    model.set_base_dtype(torch.bfloat16)
    assert {p.dtype for n, p in model.visual.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    # The buffers hold the angles of the rotation.
    assert {buffer.dtype for buffer in model.visual.buffers()} <= {torch.float32}
    assert difference(model.student_features(pixels).detach().float(), expected) < 0.05


def test_compiled_blocks_are_whole_and_the_same():
    """fullgraph: a break in a block would be an error."""
    model = randomised(build(towers.DINOV3))
    pixels = pixels_for(model)
    expected = [model.student_features(pixels).detach(), model.teacher_features(pixels)]
    for block in model.backbone.blocks:
        block.compile(fullgraph=True, backend="eager")
    actual = [model.student_features(pixels).detach(), model.teacher_features(pixels)]
    assert all(difference(a, b) < 1e-5 for a, b in zip(actual, expected))


def test_attention_is_fused_where_the_towers_own_is(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or fused(*a, **k)
    )
    for name in towers.NAMES:
        model = build(name)
        calls.clear()
        model.backbone.encode(pixels_for(model))
        assert len(calls) >= len(model.backbone.blocks), name


def test_every_accepted_model_of_open_clip_is_of_a_family():
    """Of timm's towers, without memory for their weights; open_clip's own are in test_pretrained.py."""
    accepted, refused = {}, set()
    for name in open_clip.list_models():
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
        if trunk is None or name.startswith("nano-"):
            continue
        try:
            check_tower(name, open_clip.get_model_config(name))
        except UserError:
            refused.add(trunk)
        else:
            accepted.setdefault(trunk, name)
    assert {
        "vit_base_patch16_siglip_256",
        "vit_pe_core_base_patch16_224",
        "eva02_base_patch16_clip_224",
    } < set(accepted)
    assert {"convnext_base", "vit_relpos_medium_patch16_cls_224", "swin_base_patch4_window7_224"} < refused
    built = set()
    for trunk, name in accepted.items():
        settings = own_settings(name)
        assert settings["preprocess.image_size"] == timm.get_pretrained_cfg(trunk).input_size[-1], name
        statistics = NORMALIZATIONS[settings["preprocess.normalization"]]
        tags = [open_clip.get_pretrained_cfg(name, t) for t in open_clip.list_pretrained_tags_by_model(name)]
        assert all((tuple(t["mean"]), tuple(t["std"])) == statistics for t in tags if "mean" in t), name
        kind = re.sub(r"(_(tiny|small|medium|base|large|gi\w+|enormous|so\d+m))|(_|patch)\d+", "", trunk)
        if kind not in built:
            # One of each kind is built, which takes tenths of a second.
            backbone = backbone_of(pretrained.untouched_tower(name), name)
            assert backbone.image_size == (settings["preprocess.image_size"],) * 2, name
            built.add(kind)
    assert len(built) > 3


@pytest.mark.parametrize(
    "name, settings",
    [
        ("ViT-L-14-quickgelu", {"image_size": 224, "patch_size": 32, "num_patches": 49}),
        (
            "PE-Core-L-14-336",
            {"image_size": 336, "patch_size": 28, "num_patches": 144, "normalization": "inception"},
        ),
        (f"{TIMM}vit_base_patch16_dinov3", {"image_size": 256, "patch_size": 32, "num_patches": 64}),
    ],
)
def test_own_settings(name, settings):
    found = own_settings(name)
    assert {f"preprocess.{key}": value for key, value in settings.items()}.items() <= found.items()
    PreprocessConfig(**{k.partition(".")[2]: v for k, v in found.items() if k.startswith("preprocess.")})
    # The published normalisation is not CLIP's own; that of others is theirs.
    published = "timm" not in name and "PE" not in name
    assert ("preprocess.normalization" in found) != published
    assert found.get("data.captions") == ("none" if name.startswith(TIMM) else None)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(name=f"{TIMM}vit_base_patch16_dinov9", pretrained=""),
            "did you mean timm/vit_base_patch16_dinov3",
        ),
        (dict(name=f"{TIMM}resnet50", pretrained=""), "timm's resnet50 for an image tower"),
        (
            dict(name=f"{TIMM}vit_base_patch16_plus_clip_240", pretrained="nope"),
            "no pretrained weights 'nope': .*or",
        ),
        (dict(name=towers.DINOV3, pretrained="no/such.pt"), "no/such.pt does not exist"),
        (dict(name=towers.DINOV3, pretrained="builtin"), "goes with name='dgsnet-tiny'"),
        (dict(name="MobileCLIP-B", pretrained=""), "is a MobileCLIP"),
        (
            dict(name=f"{TIMM}vit_tiny_r_s16_p8_224", pretrained=""),
            "has a VisionTransformer for an image tower",
        ),
    ],
)
def test_wrong_models_end_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        DGSNet(ModelConfig(**config), with_text=False)
    assert "\n" not in str(caught.value)


def test_damaged_or_foreign_weights_of_timm_end_in_one_line(tmp_path):
    state = untouched(towers.DINOV3).visual.state_dict()
    del state["blocks.1.attn.qkv.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for file, reason in (("lacking.safetensors", "blocks.1.attn.qkv.weight"), ("junk.pt", "")):
        with pytest.raises(
            UserError, match=f"{file} as weights of timm/vit_nano_dinov3 .*{reason}"
        ) as caught:
            DGSNet(ModelConfig(name=towers.DINOV3, pretrained=str(tmp_path / file)), with_text=False)
        assert "\n" not in str(caught.value)


def test_a_tower_without_text_says_so():
    with pytest.raises(UserError, match="has no text tower: train without captions"):
        DGSNet(ModelConfig(name=towers.DINOV3, pretrained=""))


def test_a_tokenizer_that_cannot_be_had_ends_in_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    pretrained.tokenizer_of.cache_clear()
    with pytest.raises(UserError, match=r"tokenizer of nano-map .*no route to host.*data\.captions none"):
        build("nano-map", with_text=True)
