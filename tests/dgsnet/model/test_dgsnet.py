"""DGSNet against open_clip's own CLIP, and one training step against the official algorithm."""

import copy
import gc
import json
import math

import open_clip
import pytest
import torch
from dgsnet.config import ModelConfig
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.step import TRAIN_COLUMNS

from tests.support import official
from tests.support.tiny_clip import (
    CAPTIONS,
    TINY,
    build,
    difference,
    original_clip,
    pixels_for,
    randomise_adapters,
    step,
)


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
    found = step(model, pixels, captions, labels, order=order, alignment=0.2)
    found.loss.backward()

    gradients = {name.replace(".default", ""): p.grad for name, p in model.visual.named_parameters()}
    losses = dict(zip(TRAIN_COLUMNS, found.values))
    pairs = [(losses[f"{name}_loss"], expected[name]) for name in ("image", "text", "alignment")]
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
        step(model, pixels, CAPTIONS, labels).loss.backward()
        optimizer.step()

    # The teacher has no dropout either, though the model is in training mode.
    assert torch.equal(model.teacher_features(pixels), teacher)
    assert difference(teacher, expected) < 1e-5
    assert not model.teacher_features(pixels).requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    model.eval()
    with torch.no_grad():
        assert difference(model.student_features(pixels), expected) > 1e-2


def test_there_is_one_copy_of_the_weights():
    # These belong to earlier tests.
    others = [o for o in gc.get_objects() if type(o) is torch.nn.Parameter]
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


def test_without_text_the_tower_is_gone():
    model = build(with_text=False)
    assert model.text is None and not any(name.startswith("text.") for name, _ in model.named_parameters())
    pixels = pixels_for(model)
    with torch.no_grad():
        model.eval()
        assert difference(model.student_features(pixels), build().eval().student_features(pixels)) < 1e-6
    with pytest.raises(ValueError, match="with_text=False"):
        model.text_features(CAPTIONS)
    assert step(model, pixels, None, torch.tensor([0, 1, 0, 1])).loss > 0


def test_initialisation_follows_the_seed():
    first, same, other = (build(seed=seed).adapter_state() for seed in (3, 3, 4))
    name = "transformer.resblocks.0.attn.q_proj.lora_A.weight"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    # The draw is Kaiming-uniform with a = sqrt(5).
    bound = 1 / math.sqrt(first[name].shape[1])
    assert 0.8 * bound < first[name].abs().max() <= bound
    assert not any(tensor.any() for key, tensor in first.items() if "lora_B" in key)


def test_base_in_half_precision_keeps_adapters_whole():
    model = build().eval()
    randomise_adapters(model)
    pixels = pixels_for(model)
    with torch.no_grad():
        expected = model.student_features(pixels)
    model.set_base_dtype(torch.bfloat16)
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.visual.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    step(model, pixels, CAPTIONS, torch.tensor([0, 1, 0, 1])).loss.backward()
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
        step(model, pixels_for(model), CAPTIONS, torch.tensor([0, 1, 0, 1])).loss.backward()
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
