"""One stage-2 training step of DGS-Net the way it was published, written naively: what the tests trust.

Two whole CLIPs, fused attention, captions at full length, LoRA as a dense B @ A added to the weights,
`autograd.grad` once per reference gradient and a hook on the features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def step(
    student: nn.Module,
    frozen: nn.Module,
    lora: dict[str, Tensor],
    scaling: float,
    heads: dict[str, nn.Linear],
    pixels: Tensor,
    tokens: Tensor | None,
    labels: Tensor,
    *,
    order: str,
    alignment: float = 0.2,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """Run one step; gradients are left in `lora` and in the "image" and "text" heads.

    Args:
        student, frozen: two CLIPs of equal weights, as their library builds them.
        lora: A [r, in] and B [out, r] of each adapted linear by peft's names.
        heads: "image", "teacher" and "text", each `nn.Linear(D, 1)`.
        tokens: captions [N, context length]; None: no text branch, and nothing is projected.
        labels: [N], floating.
    """
    features = torch.func.functional_call(
        student.visual, _dense_weights(student.visual, lora, scaling), (pixels,)
    )
    with torch.no_grad():
        teacher = frozen.visual(pixels)
    teacher.requires_grad_()
    teacher_loss = F.binary_cross_entropy_with_logits(heads["teacher"](teacher).squeeze(1), labels)
    (teacher_gradient,) = torch.autograd.grad(teacher_loss, teacher)
    beneficial = teacher_gradient.clamp(max=0)
    alignment_loss = (features * beneficial).sum(dim=1).mean()

    # The hook sees the gradient of all that is computed from the tensor it hangs on.
    task_features = features if order == "align_first" else features.clone()
    text_loss = features.new_zeros(())
    if tokens is not None:
        with torch.no_grad():
            text = student.encode_text(tokens)
        text.requires_grad_()
        text_loss = F.binary_cross_entropy_with_logits(heads["text"](text).squeeze(1), labels)
        (text_gradient,) = torch.autograd.grad(text_loss, text, retain_graph=True)
        harmful = text_gradient.clamp(min=0)
        direction = harmful / (harmful.norm(dim=1, keepdim=True) + eps)
        task_features.register_hook(lambda g: g - (g * direction).sum(dim=1, keepdim=True) * direction)
    image_loss = F.binary_cross_entropy_with_logits(heads["image"](task_features).squeeze(1), labels)
    (image_loss + text_loss + alignment * alignment_loss).backward()
    return {"image": image_loss, "text": text_loss, "alignment": alignment_loss}


def _dense_weights(visual: nn.Module, lora: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The adapted weights of an untouched tower: q, k and v are rows of one where the tower has them so."""
    own, weights = dict(visual.named_parameters()), {}
    for name in (key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")):
        update = scaling * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        parent, _, leaf = name.rpartition(".")
        found = [
            key
            for key in (f"{name}.weight", f"{parent}.in_proj_weight", f"{parent}.qkv.weight")
            if key in own
        ]
        weight = weights.get(found[0], own[found[0]])
        if found[0] != f"{name}.weight":
            parts = list(weight.chunk(3))
            parts["qkv".index(leaf[0])] = parts["qkv".index(leaf[0])] + update
            weights[found[0]] = torch.cat(parts)
        else:
            weights[found[0]] = weight + update
    return weights
