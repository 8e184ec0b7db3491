"""A small model of every family of image towers: the arguments of the real ones, two blocks, 32 channels."""

import json
from functools import partial
from pathlib import Path

import open_clip
import timm
import torch
from dgsnet.model.catalogue import has_text, timm_arguments
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import _create_eva
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

DINOV3 = "timm/vit_nano_dinov3"
# A small model of each family, by name; `register` makes open_clip know those of its own.
NAMES = ("nano-worldwide", "nano-map", "nano-pe", "nano-eva", DINOV3)

_NANO = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)
_ROTARY = dict(use_rot_pos_emb=True, norm_layer=partial(LayerNorm, eps=1e-5))
_CFG = dict(
    input_size=(3, 32, 32),
    num_classes=0,
    fixed_input_size=True,
    first_conv="patch_embed.proj",
    classifier="head",
)
_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
default_cfgs = generate_default_cfgs(
    {
        "vit_nano_map": _CFG | _HALF,
        "vit_nano_pe_core": _CFG | _HALF,
        "eva02_nano": _CFG,
        # timm is lenient with such weights.
        "vit_nano_dinov3.none": _CFG | dict(num_classes=1000),
    }
)


@register_model
def vit_nano_map(pretrained=False, **kwargs):
    """As SigLIP's."""
    arguments = _NANO | dict(class_token=False, global_pool="map") | kwargs
    return _create_vision_transformer("vit_nano_map", pretrained, **arguments)


@register_model
def vit_nano_pe_core(pretrained=False, **kwargs):
    """As PE-Core's."""
    arguments = _NANO | _ROTARY | kwargs
    arguments |= dict(attn_type="rope", use_pre_transformer_norm=True, attn_pool_num_heads=4)
    arguments |= dict(ref_feat_shape=(4, 4), rope_grid_offset=1.0, rope_grid_indexing="xy")
    return _create_eva("vit_nano_pe_core", pretrained, **{"global_pool": "map"} | arguments)


@register_model
def eva02_nano(pretrained=False, **kwargs):
    """As EVA-02's in CLIP, which has q, k and v apart."""
    arguments = _NANO | dict(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True)
    arguments |= dict(use_rot_pos_emb=True, ref_feat_shape=(4, 4)) | kwargs
    return _create_eva("eva02_nano", pretrained, **arguments)


@register_model
def vit_nano_dinov3(pretrained=False, **kwargs):
    """As DINOv3's, with layer scales that do not hide the blocks."""
    arguments = _NANO | _ROTARY | dict(dynamic_img_size=True, qkv_bias=False, init_values=0.5) | kwargs
    arguments |= dict(rope_type="dinov3", rope_temperature=100, rope_rotate_half=True)
    arguments |= dict(use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False)
    return _create_eva("vit_nano_dinov3", pretrained, **arguments)


class Untouched(nn.Module):
    """A small model as its library builds it, in evaluation mode: its image tower and, if any, its text.

    Its weights are random and large enough to matter, which timm's own are not.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole = (
            open_clip.create_model(name) if has_text(name) else timm.create_model(**timm_arguments(name))
        )
        self.eval().requires_grad_(False)
        for parameter in self.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)

    @property
    def visual(self) -> nn.Module:
        return getattr(self.whole, "visual", self.whole)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.whole.encode_text(tokens)


def register(folder: Path) -> dict[str, Path]:
    """Make open_clip know the small models; gives a file of `Untouched`'s weights for each, in `folder`."""
    text = dict(width=16, heads=2, layers=1)
    plain = dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8)
    for name, dim, vision, special in (
        ("nano-worldwide", 24, plain, dict(pool_type="eos", eos_id=49407)),
        ("nano-map", 32, _vision("vit_nano_map", "map", "none"), dict(no_causal_mask=True, pool_type="last")),
        ("nano-pe", 24, _vision("vit_nano_pe_core", "map", None), dict(context_length=32)),
        ("nano-eva", 24, _vision("eva02_nano", "token", None), {}),
    ):
        config = dict(embed_dim=dim, vision_cfg=vision, text_cfg=text | special, custom_text=True)
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    paths = {name: folder / f"{name.rpartition('/')[2]}.safetensors" for name in NAMES}
    for name, path in paths.items():
        save_file({key: t.contiguous() for key, t in Untouched(name).whole.state_dict().items()}, path)
    return paths


def _vision(name: str, pool: str, projection: str | None) -> dict[str, object]:
    return dict(image_size=32, timm_model_name=name, timm_pool=pool, timm_proj=projection)
