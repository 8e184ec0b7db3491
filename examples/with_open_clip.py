"""open_clip's own training loop, unchanged: it calls the loss, and the loss captures the reference."""

from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.train import train_one_epoch

from dgs_kernels import OptimizerSurgery

torch.manual_seed(0)
tower = {"width": 32, "layers": 2, "heads": 2}
vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
text = {"context_length": 16, "vocab_size": 49408, **tower}
# `open_clip.create_model(name, pretrained)` gives trained weights instead.
model = open_clip.CLIP(16, vision, text, output_dict=True)
optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
surgery = OptimizerSurgery(optimizer, granularity="layer", rule="conflict")
remembered = torch.randn(8, 3, 32, 32), open_clip.tokenize(["an old photograph"] * 8, context_length=16)


class Remembering(open_clip.ClipLoss):
    """CLIP's loss, of whose gradient nothing goes against remembered pairs (A-GEM)."""

    def forward(self, image_features, text_features, logit_scale, output_dict=False):
        with surgery.harmful():
            old = model(*remembered)
            torch.nn.functional.mse_loss(old["image_features"], old["text_features"]).backward()
        return super().forward(image_features, text_features, logit_scale, output_dict=output_dict)


class Loader(list):
    num_batches, num_samples, batch_size = 4, 32, 8


captions = open_clip.tokenize([f"photograph {i}" for i in range(8)], context_length=16)
loader = Loader((torch.randn(8, 3, 32, 32), captions) for _ in range(4))
data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
arguments = {"device": "cpu", "precision": "fp32", "batch_size": 8, "world_size": 1, "accum_freq": 1}
arguments |= {"log_every_n_steps": 1, "rank": 0, "grad_clip_norm": 1.0, "skip_scheduler": True}
arguments |= dict.fromkeys(("distill", "horovod", "distributed", "save_logs", "wandb", "log_local"), False)
train_one_epoch(model, data, Remembering(), 0, optimizer, None, None, None, SimpleNamespace(**arguments))
print(f"conflict rate {surgery.metrics().conflict_rate:.2f} over {len(surgery.metrics().layers)} layers")
