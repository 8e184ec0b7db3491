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
    tokens: Tensor,
    labels: Tensor,
    *,
    order: str,
    alignment: float = 0.2,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """Run one step; gradients are left in `lora` and in the "image" and "text" heads.

    Args:
        student, frozen: two open_clip CLIPs of equal weights.
        lora: A [r, width] and B [width, r] of each adapted linear by peft's names.
        heads: "image", "teacher" and "text", each `nn.Linear(D, 1)`.
        tokens: captions [N, context length].
        labels: [N], floating.
    """
    features = torch.func.functional_call(student.visual, _dense_weights(student, lora, scaling), (pixels,))
    with torch.no_grad():
        teacher = frozen.encode_image(pixels)
        text = student.encode_text(tokens)
    teacher.requires_grad_()
    text.requires_grad_()

    text_loss = F.binary_cross_entropy_with_logits(heads["text"](text).squeeze(1), labels)
    teacher_loss = F.binary_cross_entropy_with_logits(heads["teacher"](teacher).squeeze(1), labels)
    (text_gradient,) = torch.autograd.grad(text_loss, text, retain_graph=True)
    (teacher_gradient,) = torch.autograd.grad(teacher_loss, teacher)

    harmful = text_gradient.clamp(min=0)
    direction = harmful / (harmful.norm(dim=1, keepdim=True) + eps)
    beneficial = teacher_gradient.clamp(max=0)
    alignment_loss = (features * beneficial).sum(dim=1).mean()

    # The hook sees the gradient of all that is computed from the tensor it hangs on.
    task_features = features if order == "align_first" else features.clone()
    task_features.register_hook(lambda g: g - (g * direction).sum(dim=1, keepdim=True) * direction)
    image_loss = F.binary_cross_entropy_with_logits(heads["image"](task_features).squeeze(1), labels)
    (image_loss + text_loss + alignment * alignment_loss).backward()
    return {"image": image_loss, "text": text_loss, "alignment": alignment_loss}


def _dense_weights(clip: nn.Module, lora: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    weights = {}
    for i, block in enumerate(clip.visual.transformer.resblocks):
        attention = f"transformer.resblocks.{i}.attn"
        names = [f"{attention}.{letter}_proj" for letter in "qkv"]
        update = torch.cat([lora[f"{n}.lora_B.weight"] @ lora[f"{n}.lora_A.weight"] for n in names])
        weights[f"{attention}.in_proj_weight"] = block.attn.in_proj_weight + scaling * update
    return weights
