"""Three lines in a loop of your own: fine-tune on new data without moving against what old data asks for."""

import torch
from torch import nn

from dgs_kernels import OptimizerSurgery

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
# Step 1: the hook edits the gradients of each layer.
surgery = OptimizerSurgery(optimizer, granularity="layer", rule="full")
loss_function = nn.BCEWithLogitsLoss()


def batch(shift):
    x = torch.randn(32, 20) + shift
    return x, (x[:, :1] > shift).float()


for step in range(50):
    x, y = batch(shift=-1.0)
    # Step 2: what runs in this context counts as harmful.
    with surgery.harmful():
        # Step 3: this is the gradient of unlearning the old data.
        loss_function(-model(x), y).backward()
    x, y = batch(shift=1.0)
    loss = loss_function(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        metrics = surgery.metrics()
        removed = ", ".join(f"{layer}: {share:.1%}" for layer, share in zip(metrics.layers, metrics.removed))
        print(f"step {step}  loss {loss.item():.3f}  energy removed {removed}")
