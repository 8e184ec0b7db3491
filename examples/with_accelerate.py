"""accelerate: accumulation, clipping, TensorBoard. The hook goes on the inner optimiser, before `prepare`."""

import sys

import torch
from accelerate import Accelerator
from torch import nn

from dgs_kernels import OptimizerSurgery

accelerator = Accelerator(
    cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir=sys.argv[1]
)
accelerator.init_trackers("surgery")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
# Under fp16 also scaler=accelerator.scaler.
surgery = OptimizerSurgery(optimizer, granularity="layer", rule="conflict")
x = torch.randn(256, 20)
data = torch.utils.data.TensorDataset(x, x[:, :1].sign())
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0
for _ in range(4):
    for x, y in loader:
        with accelerator.accumulate(model):
            with surgery.harmful():
                accelerator.backward((model(x + 1.0) + y).square().mean())
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            # The loop waits for the device only where it reads metrics.
            if step % 4 == 0:
                accelerator.log({"loss": loss.item(), **surgery.metrics().scalars()}, step=step)
    print(f"step {step}  loss {loss.item():.3f}  conflict rate {surgery.metrics().conflict_rate:.2f}")
accelerator.end_training()
