"""Published detectors as files of two narrow blocks with random weights, and their forward passes.

Everything here is read off the authors' descriptions and uses nothing of the package: it is what tests trust.
"""

import json
import math

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import register_model
from torchvision import transforms as T

DEPTH = 2
# Of blocks, in place of 1024 and 768: `python -m benchmarks layouts` has them as they are.
LARGE, BASE = 256, 192
CLIP = "two-blocks-quickgelu"
CLIP_NORM = T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def register(folder):
    """Make backbones of two blocks known to open_clip and timm, by names of their own."""
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"] |= {"layers": DEPTH, "width": LARGE}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    path = folder / f"{CLIP}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    for base, width in {
        "vit_small_patch16_384": 384,
        "vit_small_patch16_224": 384,
        "vit_large_patch14_dinov2": LARGE,
        "vit_base_patch14_reg4_dinov2": BASE,
    }.items():

        def entry(pretrained=False, base=base, width=width, **kwargs):
            size = {"depth": DEPTH, "embed_dim": width, "num_heads": width // 64}
            return timm.create_model(base, pretrained=pretrained, **size, **kwargs)

        entry.__name__ = f"{base}_two"
        if not timm.is_model(entry.__name__):
            register_model(entry)


class Random:
    """Tensors of a scale at which every part of a network matters."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=None):
        fan = math.prod(shape[1:]) if len(shape) > 1 else 25
        return torch.randn(shape, generator=self.generator) * (scale or fan**-0.5)

    def linear(self, name, out, into):
        return {f"{name}.weight": self(out, into), f"{name}.bias": self(out)}

    def norm(self, name, width):
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}


def timm_state(width, tokens, *, patch, gamma=False, registers=0, seed=0):
    """A plain vision transformer by timm's names, which are DINOv2's too; tokens without registers."""
    r = Random(seed)
    state = {"cls_token": r(1, 1, width), "pos_embed": r(1, tokens, width, scale=0.5)}
    if registers:
        state["reg_token"] = r(1, registers, width, scale=0.5)
    state |= {"patch_embed.proj.weight": r(width, 3, patch, patch), "patch_embed.proj.bias": r(width)}
    for i in range(DEPTH):
        b = f"blocks.{i}."
        state |= r.norm(f"{b}norm1", width) | r.norm(f"{b}norm2", width)
        state |= r.linear(f"{b}attn.qkv", 3 * width, width) | r.linear(f"{b}attn.proj", width, width)
        state |= r.linear(f"{b}mlp.fc1", 4 * width, width) | r.linear(f"{b}mlp.fc2", width, 4 * width)
        if gamma:
            state |= {f"{b}ls1.gamma": r(width), f"{b}ls2.gamma": r(width)}
    return state | r.norm("norm", width)


def timm_features(state, pixels, *, heads, registers=0, embedded=False):
    """The class token after the last norm [N, D], in float64; of embedded patches [N, L, D] in theirs."""
    dtype = pixels.dtype if embedded else torch.float64
    w = {name: tensor.to(dtype) for name, tensor in state.items()}
    width = w["norm.weight"].numel()

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = pixels.to(dtype)
    if not embedded:
        patch = w["patch_embed.proj.weight"].shape[-1]
        x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
        x = x.flatten(2).mT
    if registers:
        # Registers have no positions, nor has the class token.
        first = [w["cls_token"].expand(len(x), -1, -1), w["reg_token"].expand(len(x), -1, -1)]
        x = torch.cat([*first, x + w["pos_embed"]], 1)
    else:
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(DEPTH):
        b = f"blocks.{i}."
        q, k, v = linear(norm(x, f"{b}norm1"), f"{b}attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, heads), f"{b}attn.proj") * w.get(f"{b}ls1.gamma", 1)
        hidden = F.gelu(linear(norm(x, f"{b}norm2"), f"{b}mlp.fc1"))
        x = x + linear(hidden, f"{b}mlp.fc2") * w.get(f"{b}ls2.gamma", 1)
    return norm(x[:, 0], "norm")


def attention(q, k, v, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def clip_state(width=LARGE, seed=0):
    """A CLIP's image tower by the names of transformers' vision model."""
    r = Random(seed)
    state = {
        "embeddings.class_embedding": r(width, scale=0.5),
        "embeddings.patch_embedding.weight": r(width, 3, 14, 14),
        "embeddings.position_embedding.weight": r(257, width, scale=0.5),
        "embeddings.position_ids": torch.arange(257)[None],
    } | r.norm("pre_layrnorm", width)
    for i in range(DEPTH):
        b = f"encoder.layers.{i}."
        state |= r.norm(f"{b}layer_norm1", width) | r.norm(f"{b}layer_norm2", width)
        for letter in ("q", "k", "v", "out"):
            state |= r.linear(f"{b}self_attn.{letter}_proj", width, width)
        state |= r.linear(f"{b}mlp.fc1", 4 * width, width) | r.linear(f"{b}mlp.fc2", width, 4 * width)
    return state | r.norm("post_layernorm", width)


def clip_features(state, pixels, *, weight=None):
    """pooler_output [N, D] of transformers' CLIPVisionModel with QuickGELU, in float64.

    `weight` makes a linear's weight of its name, where it is not stored as such.
    """
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        matrix = w[f"{name}.weight"] if weight is None or "self_attn" not in name else weight(w, name)
        return x @ matrix.T + w[f"{name}.bias"]

    x = F.conv2d(pixels.double(), w["embeddings.patch_embedding.weight"], stride=14).flatten(2).mT
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + w["embeddings.position_embedding.weight"], "pre_layrnorm")
    for i in range(DEPTH):
        b = f"encoder.layers.{i}."
        y = norm(x, f"{b}layer_norm1")
        q, k, v = (linear(y, f"{b}self_attn.{letter}_proj") for letter in "qkv")
        x = x + linear(attention(q, k, v, x.shape[-1] // 64), f"{b}self_attn.out_proj")
        y = linear(norm(x, f"{b}layer_norm2"), f"{b}mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{b}mlp.fc2")
    return norm(x[:, 0], "post_layernorm")


def openai_file(path, seed=0):
    """A CLIP by open_clip's names as a weights file, and the same tower by transformers' names."""
    theirs, r = clip_state(seed=seed), Random(seed + 1)
    projection = r(768, LARGE)
    clip = open_clip.CustomTextCLIP(**open_clip.get_model_config(CLIP))
    state = clip.state_dict()
    for i in range(DEPTH):
        a, b = f"visual.transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [theirs[f"{b}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            state[f"{a}attn.in_proj_{kind}"] = torch.cat(parts)
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            for ours, other in (pairs | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                state[f"{a}{ours}.{kind}"] = theirs[f"{b}{other}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = theirs[f"post_layernorm.{kind}"]
    state["visual.conv1.weight"] = theirs["embeddings.patch_embedding.weight"]
    state["visual.class_embedding"] = theirs["embeddings.class_embedding"]
    state["visual.positional_embedding"] = theirs["embeddings.position_embedding.weight"]
    state["visual.proj"] = projection.T.contiguous()
    torch.save(state, path)
    return theirs, projection


def pictures(folder, *sizes):
    """PNG files of smooth noise, of these widths and heights."""
    rng, paths = np.random.default_rng(0), []
    for width, height in sizes:
        small = rng.integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8)
        path = folder / f"{width}x{height}.png"
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def prepared(path, *steps):
    """An image as a test of the authors' prepares it, [1, 3, S, S]."""
    return T.Compose(steps)(Image.open(path).convert("RGB"))[None]


def effort_state(seed=0, rank=1, width=LARGE):
    """`clip_state` with every linear of attention as Effort has it: a main part, and a residual."""
    state, r = clip_state(width, seed), Random(seed + 1)
    for name in [name for name in state if "self_attn" in name and name.endswith(".weight")]:
        state[f"{name}_main"] = state.pop(name)
        stem = name.removesuffix("weight")
        residual = {"U": (width, rank), "S": (rank,), "V": (rank, width)}
        state |= {f"{stem}{letter}_residual": r(*shape, scale=0.5) for letter, shape in residual.items()}
        # Effort keeps D - rank directions here; how many they are does not matter.
        kept = {"U": (width, 3), "S": (3,), "V": (3, width)}
        state |= {f"{stem}{letter}_r": r(*shape) for letter, shape in kept.items()}
    return state


def effort_weight(w, name):
    """The weight of one of its linears."""
    u, s, v = (w[f"{name}.{letter}_residual"] for letter in "USV")
    return w[f"{name}.weight_main"] + u @ torch.diag(s) @ v


def dda_file(state, head, seed=0):
    """A file of DDA's of a `timm_state`, and the weights that its forward pass multiplies by."""
    r, file, merged = Random(seed), {}, dict(state)
    for name, tensor in state.items():
        linear, _, kind = name.rpartition(".")
        if not linear.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")):
            file[f"base_model.model.{name}"] = tensor
            continue
        file[f"base_model.model.{linear}.original_layer.{kind}"] = tensor
        if kind == "weight":
            a, b = r(8, tensor.shape[1]), r(tensor.shape[0], 8, scale=1)
            file |= {f"base_model.model.{linear}.lora.lora_A": a, f"base_model.model.{linear}.lora.lora_B": b}
            merged[name] = tensor + b @ a / 8
    file["base_model.model.mask_token"] = r(1, tensor.numel())
    return file | {f"base_model.fc.{kind}": tensor for kind, tensor in head.items()}, merged


def hub_positions(positions, side):
    """DINOv2's interpolate_pos_encoding, for a square image of so many patches along a side."""
    stored = int(math.sqrt(positions.shape[1] - 1))
    patches = positions[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    scale = float(side + 0.1) / stored
    patches = F.interpolate(patches, mode="bicubic", antialias=False, scale_factor=(scale, scale))
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


def bfree_logit(state, head, pixels, window=36):
    """The mean logit of five windows of the tokens of a whole image [1, 3, H, W], as B-Free's wrapper."""
    width = state["norm.weight"].numel()
    grid = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    # A grid that is too small is repeated.
    for axis in (2, 3):
        if grid.shape[axis] < window:
            again = torch.arange(window) % grid.shape[axis]
            grid = grid.index_select(axis, again)
    rows, columns = grid.shape[2] - window, grid.shape[3] - window
    corners = [(round(rows / 2), round(columns / 2)), (0, 0), (0, columns), (rows, 0), (rows, columns)]
    logits = {}
    for top, left in dict.fromkeys(corners):
        tokens = grid[:, :, top : top + window, left : left + window].flatten(2).mT
        features = timm_features(state, tokens, heads=width // 64, registers=4, embedded=True)
        logits[top, left] = features @ head["head.weight"].T + head["head.bias"]
    return torch.stack([logits[corner] for corner in corners]).mean()


def convert_community(folder, name=None):
    """Convert a file of Community Forensics for 224 pixels into folder/model, by the command."""
    from dgsnet.cli import main
    from safetensors.torch import save_file

    state = timm_state(384, 197, patch=16) | Random(5).linear("head", 1, 384)
    save_file({f"vit.{key}": tensor for key, tensor in state.items()}, folder / "theirs.safetensors")
    named = ["--name", name] if name else []
    main(["convert", str(folder / "theirs.safetensors"), "--out", str(folder / "model"), *named])
    return str(folder / "model")
