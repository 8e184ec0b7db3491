"""DGSNet against open_clip's own CLIP, and one training step against the official algorithm."""

import copy
import gc
import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model import adapters, pretrained
from dgsnet.model.adapters import SplitAttention
from dgsnet.model.backbones import backbone_of
from dgsnet.model.dgsnet import DGSNet
from safetensors.torch import save_file

from tests.support import official

TINY = ModelConfig(name="dgsnet-tiny", pretrained="", lora_dropout=0.0)
CAPTIONS = ["a dog", "a very blurred photograph, with compression, of a cat that sits on a mat", "", "sea"]


def build(config: ModelConfig = TINY, seed: int = 0, **options) -> DGSNet:
    torch.manual_seed(seed)
    return DGSNet(config, **options)


def original_clip(name: str = TINY.name, seed: int = 0) -> torch.nn.Module:
    """open_clip's untouched model, with the random weights that `build` has for the same seed."""
    pretrained._model_config(name)  # registers the built-in one
    torch.manual_seed(seed)
    return open_clip.create_model(name).eval().requires_grad_(False)


def randomise_adapters(model: DGSNet, scale: float = 0.05) -> None:
    """B starts at zero, where A has no gradient and student and teacher agree."""
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:
            tensor.normal_(std=scale)


def pixels_for(model: DGSNet, count: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = model.visual.conv1.weight.dtype
    return torch.randn(count, 3, model.image_size, model.image_size, generator=generator).to(dtype)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def step_difference(
    config: ModelConfig, dtype: torch.dtype, order: str, b_scale: float
) -> tuple[float, DGSNet]:
    """Largest relative difference between our step and the official one, over losses and all gradients;
    and our model after it.

    The CLIPs of one are freed before the other's is built: at full size memory counts.
    """
    student = original_clip(config.name).to(dtype)
    frozen = copy.deepcopy(student)
    scaling = config.lora_alpha / math.sqrt(config.lora_rank)
    width, dim, side = (
        student.visual.transformer.width,
        student.visual.output_dim,
        student.visual.image_size[0],
    )
    lora = {}
    for layer in range(student.visual.transformer.layers):
        for letter in "qkv":
            name = f"transformer.resblocks.{layer}.attn.{letter}_proj"
            a = torch.randn(config.lora_rank, width, dtype=dtype) / math.sqrt(width)
            b = torch.randn(width, config.lora_rank, dtype=dtype) * b_scale
            lora |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    official_lora = {name: tensor.clone().requires_grad_() for name, tensor in lora.items()}
    heads = {name: torch.nn.Linear(dim, 1, dtype=dtype) for name in ("image", "teacher", "text")}
    pixels, captions, labels = torch.randn(2, 3, side, side, dtype=dtype), CAPTIONS[:2], torch.tensor([0, 1])
    tokens = open_clip.get_tokenizer(config.name)(captions)
    assert tokens.shape == (2, 77)
    expected = official.step(
        student, frozen, official_lora, scaling, heads, pixels, tokens, labels.to(dtype), order=order
    )
    del student, frozen

    model = build(config).to(dtype)
    model.load_adapter_state(lora)
    for name, head in heads.items():
        getattr(model.head, f"{name}_head").load_state_dict(head.state_dict())
    out = model(pixels, captions, labels, order=order)
    (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()

    gradients = {name.replace(".default", ""): p.grad for name, p in model.visual.named_parameters()}
    pairs = [(getattr(out, f"{name}_loss"), expected[name]) for name in ("image", "text", "alignment")]
    for name in ("image", "text"):
        ours = getattr(model.head, f"{name}_head")
        pairs += [(ours.weight.grad, heads[name].weight.grad), (ours.bias.grad, heads[name].bias.grad)]
    pairs += [(gradients[name], official_lora[name].grad) for name in lora]
    assert model.head.teacher_head.weight.grad is None
    assert all(reference.abs().max() > 0 for _, reference in pairs)
    return max(difference(ours.detach(), reference.detach()) for ours, reference in pairs), model


@pytest.mark.parametrize("order", ["align_first", "project_first"])
def test_step_equals_the_official_algorithm(order):
    worst, _ = step_difference(TINY, torch.float64, order, b_scale=0.05)
    assert worst < 1e-9


@pytest.mark.slow
def test_step_equals_the_official_algorithm_at_full_width(tmp_path):
    """The published CLIP in all but the number of blocks: four of 24, and two of the text encoder's 12."""
    shorter = open_clip.get_model_config("ViT-L-14-quickgelu")
    shorter["vision_cfg"]["layers"], shorter["text_cfg"]["layers"] = 4, 2
    (tmp_path / "ViT-L-14-shorter.json").write_text(json.dumps(shorter))
    open_clip.add_model_config(tmp_path / "ViT-L-14-shorter.json")
    config = ModelConfig(name="ViT-L-14-shorter", pretrained="", lora_dropout=0.0)
    worst, _ = step_difference(config, torch.float32, "align_first", b_scale=0.01)
    assert worst < 1e-4


def test_all_blocks_of_the_published_model_are_adapted():
    with torch.device("meta"):
        model = DGSNet(ModelConfig(pretrained=""), with_text=False)
    assert sum(tensor.numel() for tensor in model.adapter_state().values()) == 884_736
    assert len(model.trainable_parameters()) == 24 * 3 * 2 + 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_split_attention_reproduces_the_fused_one(dtype, tolerance):
    fused = torch.nn.MultiheadAttention(48, 4, batch_first=True).to(dtype)
    torch.nn.init.normal_(fused.in_proj_bias)
    torch.nn.init.normal_(fused.out_proj.bias)
    x = torch.randn(3, 7, 48, dtype=dtype)
    mask = torch.full((7, 7), -math.inf, dtype=dtype).triu(1)
    for attn_mask in (None, mask):
        expected = fused(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
        actual = SplitAttention(fused)(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
        assert difference(actual, expected) < tolerance


def test_attention_of_bf16_on_a_cpu_is_the_formula():
    q, k, v = (torch.randn(2, 3, 5, 64, dtype=torch.bfloat16) for _ in range(3))
    for mask in (None, torch.full((5, 5), -math.inf, dtype=torch.bfloat16).triu(1)):
        wide = [t.double() for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*wide, attn_mask=None if mask is None else mask.double())
        actual = adapters._attention(q.requires_grad_(), k, v, mask)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("rank", [0, 6])
def test_features_before_training_are_open_clips(rank):
    model = build(ModelConfig(name=TINY.name, pretrained="", lora_rank=rank)).eval()
    clip, pixels = original_clip(), pixels_for(model)
    expected = clip.encode_image(pixels)
    with torch.no_grad():
        assert difference(model.student_features(pixels), expected) < 1e-5
    assert difference(model.teacher_features(pixels), expected) < 1e-5
    assert bool(model.adapter_state()) == (rank > 0)


def test_training_moves_the_student_and_leaves_the_teacher():
    model = build(ModelConfig(name=TINY.name, pretrained="", lora_dropout=0.5)).train()
    pixels, labels = pixels_for(model), torch.tensor([0, 1, 0, 1])
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    expected = original_clip().encode_image(pixels)
    teacher = model.teacher_features(pixels)
    optimizer = torch.optim.Adam(model.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(pixels, CAPTIONS, labels)
        (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
        optimizer.step()

    assert torch.equal(model.teacher_features(pixels), teacher)  # also: no dropout, though in training mode
    assert difference(teacher, expected) < 1e-5
    assert not model.teacher_features(pixels).requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    model.eval()
    with torch.no_grad():
        assert difference(model.student_features(pixels), expected) > 1e-2


def test_there_is_one_copy_of_the_weights():
    others = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]  # of earlier tests
    before = {id(o) for o in others}
    model, clip = build(), original_clip()
    trained = sum(p.numel() for p in model.trainable_parameters())
    teacher_head = model.dim + 1
    logit_scale = 1
    total = sum(p.numel() for p in clip.parameters())
    assert sum(p.numel() for p in model.parameters()) == total - logit_scale + trained + teacher_head

    # Nor does anything outside the module keep a second one: every tensor alive that is as large as a
    # weight of the vision tower is that weight.
    own = {p.data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.visual.parameters() if p.dim() == 2}
    del clip
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and id(o) not in before]
    alive = [p for p in alive if p.shape in shapes]
    assert alive and all(p.data_ptr() in own for p in alive)

    # The linears that the teacher runs are the very ones inside the student's adapted ones.
    attention = model.visual.transformer.resblocks[0].attn
    calls = []
    attention.q_proj.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    pixels = pixels_for(model, 1)
    model.teacher_features(pixels)
    assert calls == ["base"]
    model.student_features(pixels)
    assert calls == ["base", "base"]


def test_captions_are_cut_to_the_longest_without_changing_their_features():
    model, clip = build().double(), original_clip().double()
    lengths = []
    model.text.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens = open_clip.get_tokenizer(TINY.name)(CAPTIONS)
    assert difference(model.text_features(CAPTIONS), clip.encode_text(tokens)) < 1e-14
    assert lengths == [int((tokens != 0).sum(dim=1).max())]
    model.text_features([""])
    model.text_features(["cat " * 200])
    assert lengths[1:] == [2, 77]


def test_captions_stay_whole_where_later_tokens_matter():
    text = open_clip.model._build_text_tower(
        16, {"width": 32, "heads": 2, "layers": 1, "no_causal_mask": True, "pool_type": "last"}
    ).eval()
    tokens = open_clip.tokenize(CAPTIONS)
    assert torch.equal(pretrained.encode_text(text, tokens), text(tokens))


def test_eos_pooling_is_cut_at_the_first_eos():
    text = open_clip.model._build_text_tower(
        16, {"width": 32, "heads": 2, "layers": 2, "pool_type": "eos", "eos_id": 2}
    ).eval()
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[0, :4] = torch.tensor([5, 900, 7, 2])
    tokens[1, :3] = torch.tensor([5, 8, 2])
    assert difference(pretrained.encode_text(text, tokens), text(tokens)) < 1e-6


def test_without_text_the_tower_is_gone():
    model = build(with_text=False)
    assert model.text is None and not any(name.startswith("text.") for name, _ in model.named_parameters())
    pixels = pixels_for(model)
    with torch.no_grad():
        model.eval()
        assert difference(model.student_features(pixels), build().eval().student_features(pixels)) < 1e-6
    with pytest.raises(ValueError, match="with_text=False"):
        model.text_features(CAPTIONS)
    out = model(pixels, labels=torch.tensor([0, 1, 0, 1]))
    assert out.text_logits is None and out.image_loss > 0


def test_initialisation_follows_the_seed():
    first, same, other = (build(seed=seed).adapter_state() for seed in (3, 3, 4))
    name = "transformer.resblocks.0.attn.q_proj.lora_A.weight"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    bound = 1 / math.sqrt(first[name].shape[1])  # Kaiming-uniform with a = sqrt(5)
    assert 0.8 * bound < first[name].abs().max() <= bound
    assert not any(tensor.any() for key, tensor in first.items() if "lora_B" in key)


def test_adapters_round_trip():
    source, target = build(), build(seed=0)
    randomise_adapters(source)
    target.load_adapter_state({name: tensor.clone() for name, tensor in source.adapter_state().items()})
    pixels = pixels_for(source)
    with torch.no_grad():
        assert torch.equal(source.student_features(pixels), target.student_features(pixels))
    assert all("lora_" in name for name in source.adapter_state())

    state = source.adapter_state()
    name = sorted(state)[0]
    with pytest.raises(UserError, match=f"lack {name}"):
        target.load_adapter_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(UserError, match="unexpected extra"):
        target.load_adapter_state({**state, "extra": state[name]})
    with pytest.raises(UserError, match="another lora_rank"):
        build(ModelConfig(name=TINY.name, pretrained="", lora_rank=2)).load_adapter_state(state)


def test_base_in_half_precision_keeps_adapters_whole():
    model = build().eval()
    randomise_adapters(model)
    pixels = pixels_for(model)
    with torch.no_grad():
        expected = model.student_features(pixels)
    model.set_base_dtype(torch.bfloat16)
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.visual.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    out = model(pixels, CAPTIONS, torch.tensor([0, 1, 0, 1]))
    (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    with torch.no_grad():
        assert difference(model.student_features(pixels).float(), expected) < 0.05


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        model = build(ModelConfig(name=TINY.name, pretrained="", lora_dropout=0.5))
        randomise_adapters(model)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        out = model(pixels_for(model), CAPTIONS, torch.tensor([0, 1, 0, 1]))
        out.image_loss.backward()
        gradients.append([p.grad for p in model.visual.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_frozen_parameters_stay_as_the_caller_set_them():
    model = build()
    for name, parameter in model.visual.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    model.teacher_features(pixels_for(model))
    assert len(model.trainable_parameters()) == 4
    model.train()
    assert model.visual.training and not any(module.training for module in model.text.modules())


def test_weights_load_from_every_kind_of_file(tmp_path):
    clip = original_clip(seed=7)
    pixels = pixels_for(build())
    expected = clip.encode_image(pixels)
    tokens = open_clip.get_tokenizer(TINY.name)(CAPTIONS)
    state = clip.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "weights.bin")
    save_file(state, tmp_path / "weights.safetensors")
    for suffix in ("pt", "bin", "safetensors"):
        path = tmp_path / f"weights.{suffix}"
        model = DGSNet(ModelConfig(name=TINY.name, pretrained=str(path))).eval()
        with path.open("r+b") as file:  # in place: a model that still looked into its file would notice
            file.write(bytes(path.stat().st_size))
        assert difference(model.teacher_features(pixels), expected) < 1e-5
        assert difference(model.text_features(CAPTIONS), clip.encode_text(tokens)) < 1e-5
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings(
    "ignore"
)  # torch deprecates TorchScript; OpenAI's files are made of it all the same
def test_openais_torchscript_archives_load(tmp_path):
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    config["vision_cfg"] |= {"layers": 2, "width": 64}
    config["text_cfg"] |= {"layers": 1, "width": 16, "heads": 2}
    (tmp_path / "small-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-quickgelu.json")
    clip = original_clip("small-quickgelu", seed=7).half()
    archive = torch.nn.Module()
    for name, tensor in clip.state_dict().items():
        *parents, leaf = name.split(".")
        owner = archive
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, tensor)
    archive.register_buffer("input_resolution", torch.tensor(224))
    path = tmp_path / "ViT.pt"
    torch.jit.save(torch.jit.script(archive), path)

    model = DGSNet(ModelConfig(name="small-quickgelu", pretrained=str(path))).eval()
    pixels = pixels_for(model)
    assert difference(model.teacher_features(pixels), clip.float().encode_image(pixels)) < 1e-5
    with pytest.raises(UserError, match="use name=ViT-L-14-quickgelu"):
        DGSNet(ModelConfig(name="ViT-L-14", pretrained=str(path)))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(name="ViT-L-14-quickgeluu"), "did you mean ViT-L-14-quickgelu"),
        (dict(name="hf-hub:a/b"), "unknown model 'hf-hub:a/b'"),
        (dict(name="RN50"), "is a ResNet"),
        (dict(name="convnext_base"), "has timm's convnext_base for an image tower"),
        (dict(name="coca_ViT-L-14"), "is CoCa"),
        (dict(name="ViT-L-14"), "with QuickGELU .* use name=ViT-L-14-quickgelu"),
        (dict(name="ViT-B-32", pretrained="nope"), "no pretrained weights 'nope': .* laion2b_s34b_b79k"),
        (dict(name="ViT-B-32", pretrained="no/such.pt"), "no/such.pt does not exist"),
        (dict(name="ViT-B-32", pretrained="builtin"), "goes with name='dgsnet-tiny'"),
    ],
)
def test_wrong_settings_end_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        DGSNet(ModelConfig(**config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"lora_rank": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_settings_out_of_range_are_refused_where_they_are_made(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 0"):
        ModelConfig(**setting)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04" + b"\0" * 50])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_damaged_weights_end_in_one_line(tmp_path, content, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} as weights of dgsnet-tiny .* complete") as caught:
        DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=str(path)))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_end_in_one_line(tmp_path):
    path = tmp_path / "other.pt"
    state = original_clip().state_dict()
    torch.save({key: value for key, value in state.items() if "resblocks.1" not in key}, path)
    with pytest.raises(UserError, match=r"other\.pt as weights of dgsnet-tiny .*resblocks.1") as caught:
        DGSNet(ModelConfig(name="dgsnet-tiny", pretrained=str(path)))
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded_end_in_one_line(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(UserError, match=r"'openai' weights of ViT-B-32-quickgelu .* network") as caught:
        DGSNet(ModelConfig(name="ViT-B-32-quickgelu"))
    assert "\n" not in str(caught.value)


def test_attention_of_another_open_clip_is_refused():
    visual = original_clip().visual
    visual.transformer.resblocks[0].attn = torch.nn.Identity()
    with pytest.raises(UserError, match="open_clip_torch>=3,<4"):
        backbone_of(visual, TINY.name)


def test_every_plain_vision_transformer_of_open_clip_converts(tmp_path):
    """Each configuration that is not refused, shrunk to one narrow block so that it builds in no time."""
    accepted = 0
    for name in open_clip.list_models():
        try:
            config = pretrained._model_config(name)
        except UserError:
            continue
        if "timm_model_name" in config["vision_cfg"]:  # see test_backbones.py
            continue
        accepted += 1
        config["embed_dim"] = 16
        config["vision_cfg"] |= {"layers": 1, "width": 32, "head_width": 16}
        path = tmp_path / f"small-{name}.json"
        path.write_text(json.dumps(config))
        visual = open_clip.model._build_vision_tower(
            16, config["vision_cfg"], config.get("quick_gelu", False)
        )
        side = visual.image_size[0]
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            expected = visual.eval()(x)
            backbone = backbone_of(visual, name)
            assert difference(backbone.encode(x), expected) < 1e-5, name
    assert accepted >= 40
