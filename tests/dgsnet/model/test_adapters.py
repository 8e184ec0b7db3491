"""LoRA on attention that is split, and attention that is split against the fused one."""

import copy
import math

import pytest
import torch
from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model.adapters import SplitAttention
from dgsnet.model.dgsnet import DGSNet

from tests.support.tiny_clip import TINY, build, difference, pixels_for, randomise_adapters


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
    """Within training, where what it is given requires a gradient."""
    narrow = SplitAttention(torch.nn.MultiheadAttention(128, 2, batch_first=True)).bfloat16()
    wide = copy.deepcopy(narrow).double()
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16).requires_grad_()
    for mask in (None, torch.full((5, 5), -math.inf, dtype=torch.bfloat16).triu(1)):
        actual = narrow(x, x, x, attn_mask=mask)[0]
        y = x.detach().double()
        expected = wide(y, y, y, attn_mask=None if mask is None else mask.double())[0]
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.03)
        assert actual.requires_grad and actual.dtype == torch.bfloat16


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
