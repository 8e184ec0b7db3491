"""Lightning: automatic optimisation, references captured in `training_step`, metrics in a callback."""

import sys

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from dgs_kernels import SurgeryAdamW


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))

    def configure_optimizers(self):
        self.optimizer = SurgeryAdamW(
            self.net.named_parameters(), lr=1e-3, granularity="layer", rule="conflict"
        )
        return self.optimizer

    def training_step(self, batch):
        x, y = batch
        with self.optimizer.harmful():
            (self.net(x + 1.0) + y).square().mean().backward()
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss


class SurgeryMetrics(lightning.Callback):
    """The three lines that plot cosine, removed energy and conflicts of every layer."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % 4 == 0:
            trainer.logger.log_metrics(module.optimizer.metrics().scalars(), step=trainer.global_step)


torch.manual_seed(0)
x = torch.randn(256, 20)
data = torch.utils.data.TensorDataset(x, x[:, :1].sign())
trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=TensorBoardLogger(sys.argv[1]),
    callbacks=[SurgeryMetrics()],
    enable_checkpointing=False,
    enable_progress_bar=False,
    log_every_n_steps=4,
)
model = Classifier()
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
print(f"conflict rate {model.optimizer.metrics().conflict_rate:.2f}")
