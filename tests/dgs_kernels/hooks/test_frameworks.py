"""Every hook in the loops of other libraries, against the same computation done plainly."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from open_clip_train.train import train_one_epoch

from tests.dgs_kernels.hooks.table import check, refused, works
from tests.dgs_kernels.hooks.training_loops import (
    ALIGNMENT,
    MAX_NORM,
    ROWS,
    STEPS,
    SURGERY,
    TRAINER,
    Hook,
    Net,
    assert_same,
    batch,
    hooks,
    on_parameters,
    plain,
    task_loss,
    train,
    weights,
)


@hooks
@pytest.mark.parametrize("clip", [None, "before"])
def test_accelerate(kind, clip):
    if kind == "features" and clip:
        # The surgery on features is over when the backward is.
        clip = "after"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = Net()
    hook = Hook(kind, net)
    model, optimizer = accelerator.prepare(net, hook.optimizer)
    for number in range(STEPS):
        for i in range(4):
            with accelerator.accumulate(model):
                hook.backward(model, batch(number).part(i, 4), accelerator.backward)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
    assert_same(weights(net), plain(kind, clip=clip))
    works("accelerate", kind)


@on_parameters
def test_accelerate_wrapper(kind):
    model = Net()
    if kind in SURGERY:
        wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
        with refused("accelerate_wrapper", kind, "pass its .optimizer", TypeError):
            SURGERY[kind](wrapped)
    else:
        hook = Hook(kind, model)
        train(hook, model, step=Accelerator(cpu=True).prepare(hook.optimizer).step)
        assert_same(weights(model), plain(kind))
        works("accelerate_wrapper", kind)


class Lit(lightning.LightningModule):
    def __init__(self, kind, automatic, accumulate):
        super().__init__()
        self.net, self.automatic_optimization, self.accumulate = Net(), automatic, accumulate
        self.hook = Hook(kind, self.net)

    def configure_optimizers(self):
        return self.hook.optimizer

    def training_step(self, number):
        number, part = divmod(int(number), self.accumulate)
        b = batch(number).part(part, self.accumulate)
        if self.automatic_optimization:
            self.hook.references(self.net, b, weight=1 / self.accumulate)
            return self.hook.loss(self.net, b)
        optimizer = self.optimizers()
        self.hook.backward(self.net, b, self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()


def fit(module, accumulate=1, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, "barebones": False}
    trainer = lightning.Trainer(accumulate_grad_batches=accumulate, **quiet, **options)
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS * accumulate)))


@hooks
def test_lightning(kind):
    module = Lit(kind, automatic=True, accumulate=2)
    fit(module, accumulate=2)
    assert_same(weights(module.net), plain(kind))
    module = Lit(kind, automatic=True, accumulate=1)
    fit(module, gradient_clip_val=MAX_NORM)
    clip = "after" if kind == "features" else "before"
    assert_same(weights(module.net), plain(kind, clip=clip))
    works("lightning", kind)


@hooks
def test_lightning_manual(kind):
    module = Lit(kind, automatic=False, accumulate=1)
    fit(module)
    assert_same(weights(module.net), plain(kind))
    works("lightning_manual", kind)


@hooks
def test_trainer(kind, tmp_path):
    net = Net()
    hook = Hook(kind, net)

    class SurgeryTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            number, part = divmod(int(inputs["number"]), 2)
            b = batch(number).part(part, 2)
            hook.references(model, b, self.accelerator.backward, 1 / self.args.gradient_accumulation_steps)
            return hook.loss(model, b)

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        gradient_accumulation_steps=2,
        **TRAINER,
    )
    data = [{"number": torch.tensor(number)} for number in range(2 * STEPS)]
    SurgeryTrainer(net, arguments, train_dataset=data, optimizers=(hook.optimizer, None)).train()
    assert_same(weights(net), plain(kind))
    works("trainer", kind)


class OpenClipNet(Net):
    """Net as open_clip's loop calls a model: the "texts" carry the number of the batch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("logit_scale", torch.zeros(()))

    def forward(self, images, texts):
        b = batch(int(texts))
        prediction, alignment_loss = super().forward(
            images, *((b.harmful, b.beneficial) if self.kind == "features" else ())
        )
        out = {"prediction": prediction, "alignment_loss": alignment_loss, "number": texts}
        return out | {"logit_scale": self.logit_scale}


@hooks
def test_open_clip(kind):
    model = OpenClipNet(kind)
    hook = Hook(kind, model)

    def loss(prediction, alignment_loss, number, logit_scale, output_dict):
        """Where open_clip's loop lets a user in: it calls this before its own backward."""
        b = batch(int(number))
        hook.references(partial(Net.forward, model), b)
        return {"task": task_loss(prediction, b), "alignment": ALIGNMENT * alignment_loss}

    loader = [(batch(number).x, torch.tensor([number])) for number in range(STEPS)]
    sizes = {"num_batches": STEPS, "num_samples": STEPS * ROWS, "batch_size": ROWS}
    loader = type("Loader", (list,), sizes)(loader)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    arguments = SimpleNamespace(
        device="cpu",
        precision="fp64",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        distributed=False,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=ROWS,
        log_local=False,
        log_every_n_steps=1,
        save_logs=False,
        wandb=False,
    )
    train_one_epoch(model, data, loss, 0, hook.optimizer, None, None, None, arguments)
    assert_same(weights(model), plain(kind))
    works("open_clip", kind)


@on_parameters
def test_deepspeed(kind):
    """It is not needed: accelerate has its optimiser's wrapper, and ZeRO puts partitions in its groups."""
    model, remedy = Net(), "use FSDP2, or DDP with torch's ZeroRedundancyOptimizer"
    if kind in SURGERY:
        # Accelerate's wrappers ask for an Accelerator.
        Accelerator(cpu=True)
        wrapper = DeepSpeedOptimizerWrapper(torch.optim.SGD(model.parameters()))
        with refused("deepspeed", kind, remedy, TypeError):
            SURGERY[kind](wrapper)
    hook = Hook(kind, model)
    partition = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    hook.optimizer.param_groups[0]["params"] = [partition]
    with refused("deepspeed", kind, remedy):
        hook.references(model, batch(0))


def test_the_documented_table_is_what_these_tests_found():
    check(__file__)
