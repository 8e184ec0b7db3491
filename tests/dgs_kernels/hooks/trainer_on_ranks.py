"""HF Trainer with accelerate's FSDP2, on two processes with gloo; run by two_ranks.py."""

from __future__ import annotations

import os
import tempfile

import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType

from tests.dgs_kernels.hooks.training_loops import STEPS, TRAINER, Hook, Net, batch, weights


def arguments(folder: str, rank: int, accumulate: int, **accelerator) -> transformers.TrainingArguments:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    found = transformers.TrainingArguments(
        folder,
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LayerNorm"]},
        parallelism_config=ParallelismConfig(dp_shard_size=2),
        accelerator_config={"gradient_accumulation_kwargs": accelerator},
        gradient_accumulation_steps=accumulate,
        **TRAINER,
    )
    # accelerate shards where the processes have devices of their own, and these say that they do.
    found.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return found


def trained(kind, rank, accumulate, **accelerator):
    """Each rank has half of every batch, in parts that it accumulates."""
    net, parts = Net(), 2 * accumulate

    class SurgeryTrainer(transformers.Trainer):
        def create_optimizer(self, model=None):
            """The parameters are whole here, and sharded when training begins."""
            options = {} if kind == "features" else {"model": self.model}
            self.hook = Hook(kind, self.model, **options)
            self.optimizer = self.hook.optimizer
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            number, part = divmod(int(inputs["number"]), parts)
            b = batch(number).part(part, parts)
            self.hook.references(model, b, self.accelerator.backward, 1 / accumulate)
            return self.hook.loss(model, b)

    data = [{"number": torch.tensor(number)} for number in range(parts * STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SurgeryTrainer(net, arguments(folder, rank, accumulate, **accelerator), train_dataset=data)
        trainer.train()
    assert all(hasattr(p, "device_mesh") for p in net.parameters()), "Trainer did not shard the model"
    return weights(net)


def trainer_fsdp2(kind, rank):
    return trained(kind, rank, accumulate=2, sync_each_batch=True)


def trainer_fsdp2_no_sync(kind, rank):
    return trained(kind, rank, accumulate=2)


SCENARIOS = {"trainer_fsdp2": trainer_fsdp2, "trainer_fsdp2_no_sync": trainer_fsdp2_no_sync}
