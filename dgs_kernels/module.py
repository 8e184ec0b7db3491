"""`SurgeryHead`: the three linear heads of DGS-Net as an `nn.Module`, around `surgery_head`."""

from __future__ import annotations

from torch import Tensor, nn

from dgs_kernels.arguments import check_whole
from dgs_kernels.ops.surgery_head import SurgeryHeadOutput, surgery_head


class SurgeryHead(nn.Module):
    """The three linear heads of DGS-Net, `image_head`, `teacher_head` (frozen) and `text_head`.

    Args:
        dim: D, the width of the features, >= 1.

    Example:
        >>> import torch
        >>> from dgs_kernels import SurgeryHead
        >>> head = SurgeryHead(16)
        >>> f, t, c = torch.randn(3, 8, 16).unbind()
        >>> out = head(f.requires_grad_(), t, c, torch.ones(8))
        >>> (out.image_loss + out.text_loss + 0.2 * out.alignment_loss).backward()
    """

    def __init__(self, dim: int) -> None:
        check_whole("SurgeryHead", "dim", dim)
        super().__init__()
        self.image_head = nn.Linear(dim, 1)
        self.teacher_head = nn.Linear(dim, 1).requires_grad_(False)
        self.text_head = nn.Linear(dim, 1)

    def forward(
        self,
        features: Tensor,
        teacher_features: Tensor,
        text_features: Tensor | None,
        labels: Tensor,
        *,
        order: str = "align_first",
        eps: float = 1e-6,
        reference_batch_size: int | None = None,
        text: str = "project",
        offsets: Tensor | None = None,
        distillation: float = 0.0,
    ) -> SurgeryHeadOutput:
        """`surgery_head` with this module's weights."""
        heads = (self.image_head, self.teacher_head, self.text_head)
        return surgery_head(
            *(features, teacher_features, text_features, labels),
            *(parameter for head in heads for parameter in (head.weight, head.bias)),
            order=order,
            eps=eps,
            reference_batch_size=reference_batch_size,
            text=text,
            offsets=offsets,
            distillation=distillation,
        )
