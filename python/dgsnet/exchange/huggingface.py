"""Image towers as transformers' models: the class that holds a family, its settings, its names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dgsnet.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgsnet.model.dgsnet import DGSNet

State = dict[str, "Tensor"]


@dataclass(frozen=True)
class Form:
    """How transformers holds a family of towers, as huggingface.yaml tells.

    Attributes:
        settings: a model to the arguments of the configuration.
        tensors: changes what has another form there; by its names.
    """

    config: str
    model: str
    output: str
    blocks: str
    names: dict[str, str]
    settings: Callable[[DGSNet], dict[str, Any]]
    tensors: Callable[[State], State]

    def name(self, key: str) -> str:
        """The name there of a tensor of our tower, adapters included."""
        for ours, theirs in self.names.items():
            key = re.sub(ours, theirs, key)
        return key

    def targets(self, adapters: State) -> str:
        """A regular expression for the linears there that have an adapter, for peft."""
        linears = {self.name(key).split(".lora_")[0].rpartition(".")[2] for key in adapters}
        return rf"(.*\.)?{re.escape(self.blocks)}\.\d+\..*\.({'|'.join(sorted(linears))})"


def form_of(model: DGSNet) -> Form | None:
    """The form for a model's tower; None where transformers has none."""
    from timm.layers import RotaryEmbeddingDinoV3

    from dgsnet.model.backbones import Timm

    if not isinstance(model.backbone, Timm):
        return None if model.config.feature == "class" else CLIP
    trunk = model.backbone.trunk
    rope = getattr(trunk, "rope", None)
    if isinstance(rope, RotaryEmbeddingDinoV3):
        return DINOV3
    return SIGLIP if rope is None and trunk.attn_pool is not None else None


def frozen_encoder(model: DGSNet, form: Form, name: str) -> nn.Module:
    """The image tower without adapters as transformers' model.

    Raises:
        UserError: the tower has tensors that the form does not, or lacks some; `name` is the backbone's.
    """
    import transformers

    encoder = getattr(transformers, form.model)(getattr(transformers, form.config)(**form.settings(model)))
    state = {
        form.name(key.replace(".base_layer.", ".")): tensor
        for key, tensor in model.visual.state_dict().items()
        if "lora_" not in key
    }
    state = form.tensors(state)
    shapes = {key: tensor.shape for key, tensor in encoder.named_parameters()}
    if other := {key: tensor.shape for key, tensor in state.items()}.items() ^ shapes.items():
        raise UserError(
            f"the backbone {name} is no {form.model} of transformers ({min(other)[0]} is not in both): "
            "export it as onnx, torchscript or safetensors"
        )
    encoder.load_state_dict({key: tensor.contiguous() for key, tensor in state.items()}, strict=False)
    return encoder.eval()


def _clip_settings(model: Any) -> dict[str, Any]:
    visual, block = model.visual, model.backbone.blocks[0]
    return dict(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(model.backbone.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=model.image_size,
        patch_size=visual.conv1.kernel_size[0],
        projection_dim=model.dim,
        hidden_act={"QuickGELU": "quick_gelu", "GELU": "gelu"}[type(block.mlp.gelu).__name__],
        layer_norm_eps=visual.ln_post.eps,
    )


def _clip_tensors(state: State) -> State:
    return state | {"visual_projection.weight": state["visual_projection.weight"].T}


def _timm_settings(model: Any) -> dict[str, Any]:
    trunk, block = model.backbone.trunk, model.backbone.blocks[0]
    activation = type(block.mlp.act).__name__
    return dict(
        hidden_size=trunk.embed_dim,
        intermediate_size=block.mlp.fc2.in_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=model.image_size,
        patch_size=trunk.patch_embed.patch_size[0],
        hidden_act={"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu"}.get(
            activation, activation
        ),
        layer_norm_eps=trunk.norm.eps,
    )


def _siglip_tensors(state: State) -> State:
    import torch

    position = "embeddings.position_embedding.weight"
    for kind in ("weight", "bias"):
        parts = [state.pop(f"head.{part}.{kind}") for part in ("q", "kv") if f"head.{part}.{kind}" in state]
        state[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    return state | {position: state[position][0]}


def _dinov3_settings(model: Any) -> dict[str, Any]:
    trunk, block = model.backbone.trunk, model.backbone.blocks[0]
    return _timm_settings(model) | dict(
        num_register_tokens=trunk.num_prefix_tokens - 1,
        use_gated_mlp=hasattr(block.mlp, "fc1_g"),
        rope_theta=trunk.rope.temperature,
        query_bias=block.attn.q_proj.bias is not None,
        value_bias=block.attn.v_proj.bias is not None,
    )


def _dinov3_tensors(state: State) -> State:
    # What hides patches in pretraining; timm leaves it out.
    return state | {
        "embeddings.mask_token": state["embeddings.cls_token"].new_zeros(1, 1, state["norm.bias"].numel())
    }


_FORMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
CLIP = Form(**_FORMS["CLIP"], settings=_clip_settings, tensors=_clip_tensors)
SIGLIP = Form(**_FORMS["SIGLIP"], settings=_timm_settings, tensors=_siglip_tensors)
DINOV3 = Form(**_FORMS["DINOV3"], settings=_dinov3_settings, tensors=_dinov3_tensors)
