"""Every hook in every loop, against the same computation done plainly; docs/hooks.md's table is made here."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from open_clip_train.train import train_one_epoch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import tests.dgs_kernels.training_loops as tl
from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, gradient_surgery, reference
from tests.dgs_kernels.hooks_on_two_ranks import on_two_ranks
from tests.dgs_kernels.training_loops import (
    HOOKS,
    STEPS,
    Hook,
    Net,
    assert_same,
    batch,
    plain,
    reference_loss,
    task_loss,
    weights,
)
from tests.support.fresh import FORKSERVER

DOCUMENT = Path(__file__).parents[2] / "docs" / "hooks.md"
MAX_NORM = 0.05
WRITE = "DGS_WRITE_TABLE"
SURGERY = {"parameters": OptimizerSurgery, "objectives": ObjectiveSurgery}

# Rows of the table, in order; the cells are what the tests below found.
LOOPS = {
    "plain": "plain loop",
    "accumulation": "gradient accumulation",
    "clip_before": "gradient clipping, then surgery",
    "clip_after": "surgery, then gradient clipping",
    "fp16": "fp16 autocast with `GradScaler`",
    "fused_scaler": "fused optimiser with `GradScaler`, gradients not unscaled",
    "bf16": "bf16 autocast",
    "checkpointing": "activation checkpointing",
    "compile": "`torch.compile(model, fullgraph=True)`",
    "closure": "`optimizer.step(closure)`",
    "closures": "`torch.optim.LBFGS`",
    "ddp": "DDP",
    "ddp_no_sync": "DDP, accumulation under `no_sync`",
    "ddp_two_backwards": "DDP, several backwards of one forward",
    "ddp_one_forward": "the same, the task's first, with `process_group=`",
    "ddp_captures": "DDP, references not through the wrapper",
    "fsdp2": "FSDP2",
    "fsdp2_scaler": "FSDP2 with `GradScaler`",
    "fsdp2_no_sync": "FSDP2, `set_requires_gradient_sync(False)`",
    "fsdp2_without_model": "FSDP2, hook not told of the model",
    "accelerate": "accelerate, accumulation and clipping",
    "accelerate_wrapper": "accelerate's wrapped optimiser",
    "lightning": "Lightning, automatic optimisation",
    "lightning_manual": "Lightning, manual optimisation",
    "trainer": "HF Trainer",
    "open_clip": "open_clip's `train_one_epoch`",
}
cells: dict[tuple[str, str], str] = {}

hooks = pytest.mark.parametrize("kind", HOOKS)
on_parameters = pytest.mark.parametrize("kind", HOOKS[1:])


def works(loop: str, kind: str) -> None:
    cells[loop, kind] = "right"


def is_refused(loop: str, kind: str, error, remedy: str) -> None:
    assert remedy in str(error)
    cells[loop, kind] = f"raises: {remedy}"


@contextlib.contextmanager
def refused(loop: str, kind: str, remedy: str, error=RuntimeError):
    with pytest.raises(error) as raised:
        yield
    is_refused(loop, kind, raised.value, remedy)


def train(
    hook, model, *, parts=1, backward=torch.Tensor.backward, dtype=torch.float64, before_step=None, step=None
):
    for number in range(STEPS):
        b = batch(number, dtype)
        for i in range(parts):
            hook.backward(model, b.part(i, parts), backward, 1 / parts)
        if before_step:
            before_step()
        (step or hook.optimizer.step)()
        hook.optimizer.zero_grad()


def autocast(model, dtype):
    def forward(*inputs):
        with torch.autocast("cpu", dtype=dtype):
            return model(*inputs)

    return forward


@hooks
def test_plain(kind):
    model = Net()
    train(Hook(kind, model), model)
    assert_same(weights(model), plain(kind))
    works("plain", kind)


@hooks
def test_accumulation(kind):
    model = Net()
    train(Hook(kind, model), model, parts=4)
    assert_same(weights(model), plain(kind))
    works("accumulation", kind)


@hooks
def test_clip_before(kind):
    """Feature surgery happens in the backward: whoever clips, clips what it left."""
    if kind == "features":
        return
    model = Net()
    train(Hook(kind, model), model, before_step=lambda: clip_grad_norm_(model.parameters(), MAX_NORM))
    assert_same(weights(model), plain(kind, clip="before", max_norm=MAX_NORM))
    works("clip_before", kind)


@hooks
def test_clip_after(kind):
    model = Net()
    hook = Hook(kind, model)

    def clip(*_):
        clip_grad_norm_(model.parameters(), MAX_NORM)

    if kind == "SurgeryAdamW":
        with refused("clip_after", kind, "use OptimizerSurgery on torch.optim.AdamW"):
            hook.optimizer.register_step_pre_hook(clip)
        return
    if kind != "features":
        hook.optimizer.register_step_pre_hook(clip)  # hooks run in the order they were registered in
    train(hook, model, before_step=clip if kind == "features" else None)
    assert_same(weights(model), plain(kind, clip="after", max_norm=MAX_NORM))
    works("clip_after", kind)


def scaled(kind, init_scale=1024.0, **options):
    model, scaler = Net(torch.float32), torch.amp.GradScaler("cpu", init_scale=init_scale)
    hook = Hook(kind, model, **({} if kind == "features" else {"scaler": scaler}), **options)

    def step():
        scaler.step(hook.optimizer)
        scaler.update()

    return model, scaler, hook, step


@hooks
@pytest.mark.parametrize("unscale", [False, True])
def test_fp16(kind, unscale):
    model, scaler, hook, step = scaled(kind)
    train(
        hook,
        autocast(model, torch.float16),
        parts=2,
        backward=lambda loss: scaler.scale(loss).backward(),
        dtype=torch.float32,
        before_step=(lambda: scaler.unscale_(hook.optimizer)) if unscale else None,
        step=step,
    )
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=4e-3)
    works("fp16", kind)


@hooks
@pytest.mark.parametrize("overflow", ["task", "harmful"])
def test_a_skipped_fp16_step_leaves_nothing_behind(kind, overflow):
    """An overflow in task or reference skips the step and lowers the scale; what follows does not notice."""
    if kind == "features" and overflow == "harmful":
        return
    model, scaler, hook, step = scaled(kind)
    b = batch(50, torch.float32)
    hook.references(
        model, b, lambda loss: scaler.scale(loss * (torch.inf if overflow == "harmful" else 1)).backward()
    )
    scaler.scale(hook.loss(model, b) * (torch.inf if overflow == "task" else 1)).backward()
    step()
    hook.optimizer.zero_grad()
    assert scaler.get_scale() == 512 and all(map(torch.equal, weights(model), weights(Net(torch.float32))))
    train(hook, model, backward=lambda loss: scaler.scale(loss).backward(), dtype=torch.float32, step=step)
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=1e-4)


@on_parameters
def test_what_a_skipped_step_left_is_not_in_one_without_references(kind):
    model, scaler, hook, step = scaled(kind)
    b = batch(50, torch.float32)
    hook.references(model, b, lambda loss: scaler.scale(loss).backward())
    scaler.scale(hook.loss(model, b) * torch.inf).backward()
    step()
    hook.optimizer.zero_grad()
    scaler.scale(hook.loss(model, b)).backward()
    step()

    alone = Net(torch.float32)
    optimizer = torch.optim.AdamW(alone.parameters(), **tl.ADAMW)
    hook.loss(alone, b).backward()
    optimizer.step()
    assert_same(weights(model), weights(alone), tolerance=1e-5)


@on_parameters
def test_a_scaler_that_surgery_was_not_told_of_is_refused(kind):
    model, scaler = Net(torch.float32), torch.amp.GradScaler("cpu")
    hook = Hook(kind, model)
    hook.backward(model, batch(0, torch.float32), lambda loss: scaler.scale(loss).backward())
    with pytest.raises(RuntimeError, match="pass it as scaler="):
        scaler.step(hook.optimizer)


@hooks
def test_fused_scaler(kind):
    """A fused optimiser unscales inside its step, too late for surgery on parameters."""
    if kind == "SurgeryAdamW":
        with refused("fused_scaler", kind, "use OptimizerSurgery", ValueError):
            Hook(kind, Net(torch.float32), fused=True)
        return
    model, scaler, hook, step = scaled(kind, optimizer_options={"fused": True})
    options = {"backward": lambda loss: scaler.scale(loss).backward(), "dtype": torch.float32, "step": step}
    if kind != "features":
        with refused("fused_scaler", kind, "call scaler.unscale_(optimizer) before scaler.step(optimizer)"):
            train(hook, model, **options)
        model, scaler, hook, options["step"] = scaled(kind, optimizer_options={"fused": True})
        train(hook, model, before_step=lambda: scaler.unscale_(hook.optimizer), **options)  # the remedy
    else:
        train(hook, model, **options)
        works("fused_scaler", kind)
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=1e-4)


@hooks
def test_bf16(kind):
    model = Net(torch.float32)
    train(Hook(kind, model), autocast(model, torch.bfloat16), dtype=torch.float32)
    assert_same(weights(model), plain(kind, dtype=torch.float32), tolerance=1e-2)
    works("bf16", kind)


class Checkpointed(Net):
    """Recomputes its backbone, or all of itself with the surgery inside, during the backward."""

    def __init__(self, whole: bool, use_reentrant: bool):
        super().__init__()
        self.checkpoint = partial(checkpoint, use_reentrant=use_reentrant)
        self.whole = whole

    def forward(self, x, *directions):
        x = x.requires_grad_()  # the reentrant kind needs an input that does
        if self.whole:
            return self.checkpoint(super().forward, x, *directions)
        backbone, self.backbone = self.backbone, partial(self.checkpoint, self.backbone)
        try:
            return super().forward(x, *directions)
        finally:
            self.backbone = backbone

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if isinstance(value, partial) else super().__setattr__(
            name, value
        )


@hooks
@pytest.mark.parametrize("whole", [False, True], ids=["surgery outside", "surgery inside"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(kind, whole, use_reentrant):
    model = Checkpointed(whole, use_reentrant)
    train(Hook(kind, model), model)
    assert_same(weights(model), plain(kind))
    works("checkpointing", kind)


@hooks
def test_compile(kind):
    model = Net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(Hook(kind, model), compiled)
    assert_same(weights(model), plain(kind))
    works("compile", kind)


@hooks
def test_closure(kind):
    model = Net()
    hook = Hook(kind, model)
    for number in range(STEPS):

        def closure(number=number):
            hook.optimizer.zero_grad()
            hook.references(model, batch(number))
            loss = hook.loss(model, batch(number))
            loss.backward()
            return loss

        assert hook.optimizer.step(closure) > 0
    assert_same(weights(model), plain(kind))
    works("closure", kind)


@pytest.mark.parametrize("kind", ["parameters", "objectives"])
def test_closures(kind):
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters())
    surgery = SURGERY[kind](optimizer)

    def closure():
        optimizer.zero_grad()
        with surgery.objective() if kind == "objectives" else surgery.harmful():
            reference_loss(model(batch(0).x_harmful)[0]).backward()
        loss = task_loss(model(batch(0).x)[0], batch(0))
        loss.backward()
        return loss

    with refused("closures", kind, "surgery needs one that does so once"):
        optimizer.step(closure)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What every scenario left on both of two processes: {(loop, kind): weights, or the error's text}."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [FORKSERVER.Process(target=on_two_ranks, args=(rank, str(folder))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for key, outcome in first.items():
        if isinstance(outcome, str):
            assert outcome == second[key]
        else:
            assert all(map(torch.equal, outcome, second[key])), f"{key}: the ranks drifted apart"
    return first


@hooks
@pytest.mark.parametrize(
    "loop, scenarios",
    [
        ("ddp", ["ddp", "ddp_bucket_views"]),
        ("ddp_no_sync", ["ddp_no_sync", "ddp_no_sync_bucket_views"]),
        ("ddp_one_forward", ["ddp_two_backwards_remedy", "process_group_of_one"]),
        ("fsdp2", ["fsdp2", "fsdp2_layer", "fsdp2_model", "fsdp2_in_part"]),
    ],
)
def test_two_ranks(two_ranks, kind, loop, scenarios):
    layers = {"fsdp2_layer": [0, 0, 1, 1, 2, 2], "fsdp2_model": [0] * 6, "fsdp2_in_part": [0] * 6}
    for scenario in scenarios:
        assert_same(two_ranks[scenario, kind], plain(kind, layers=layers.get(scenario, range(6))))
    works(loop, kind)


@on_parameters
@pytest.mark.parametrize(
    "loop, scenarios, remedy",
    [
        ("ddp_two_backwards", ["ddp_two_backwards"], "pass process_group="),
        ("ddp_captures", ["ddp_captures_without_the_wrapper"], "pass process_group="),
        (
            "fsdp2_no_sync",
            ["fsdp2_no_sync", "fsdp2_task_unreduced"],
            "do not call set_requires_gradient_sync(False)",
        ),
        ("fsdp2_scaler", ["fsdp2_scaler"], "train in bfloat16"),
        ("fsdp2_without_model", ["fsdp2_without_model"], "need model="),
    ],
)
def test_two_ranks_refused(two_ranks, kind, loop, scenarios, remedy):
    for scenario in scenarios:
        is_refused(loop, kind, two_ranks[scenario, kind], remedy)


@pytest.mark.parametrize(
    "scenario", ["captured_ddp", "captured_without_the_wrapper", "captured_scaler_fsdp2"]
)
def test_every_loss_captured_on_two_ranks(two_ranks, scenario):
    assert_same(two_ranks[scenario, "objectives"], plain("objectives"))


@pytest.mark.parametrize(
    "scenario, granularity",
    [
        ("captured_running_ddp", "tensor"),
        ("captured_running_without_the_wrapper", "tensor"),
        ("captured_running_fsdp2", "layer"),
    ],
)
def test_running_sum_on_two_ranks(two_ranks, scenario, granularity):
    model = Net()
    hook = Hook("objectives", model, mode="running", weighting="pcgrad", granularity=granularity, model=model)
    for number in range(STEPS):
        hook.capture(model, batch(number))
        hook.optimizer.step()
        hook.optimizer.zero_grad()
    assert_same(two_ranks[scenario, "objectives"], weights(model))


def test_parameters_that_a_loss_reaches_on_one_rank_only(two_ranks):
    """Gradients are means over ranks, zero where a rank has none; a parameter that no rank reaches rests."""
    net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("both", "one")}).double()
    for p in net.parameters():
        torch.nn.init.constant_(p, 0.5)
    params = list(net.parameters())
    xs = [torch.tensor([1.0, 2.0 + rank], dtype=torch.float64) for rank in range(2)]

    def gradients(routes):
        hidden = [net["both"](x) for x in xs]
        total = sum((net["one"](h) if route else h).square().sum() for h, route in zip(hidden, routes)) / 2
        return list(torch.autograd.grad(total, params))

    objectives = [gradients((True, False)), gradients((True, True))]
    rows = tl.every_product(reference.gramian(objectives, [0] * 4)[0])
    for p, grad in zip(params, reference.combine_(objectives[0], objectives, rows, [0] * 4)):
        p.grad = grad
    torch.optim.AdamW(params, lr=0.5, eps=0.5).step()
    *reached, weight, bias = two_ranks["captured_on_some_ranks", "objectives"]
    torch.testing.assert_close(reached, weights(net))
    assert (weight == 0.5).all() and (bias == 0.5).all()


@pytest.mark.parametrize("loop", ["fsdp2_no_sync", "fsdp2_scaler"])
def test_features_do_not_care_how_gradients_are_reduced(two_ranks, loop):
    assert_same(two_ranks[loop, "features"], plain("features"))
    works(loop, "features")


@hooks
@pytest.mark.parametrize("clip", [None, "before"])
def test_accelerate(kind, clip):
    if kind == "features" and clip:
        clip = "after"  # the surgery is over when the backward is
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
    assert_same(weights(net), plain(kind, clip=clip, max_norm=MAX_NORM))
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
    assert_same(weights(module.net), plain(kind, clip=clip, max_norm=MAX_NORM))
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
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
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
        return {"task": task_loss(prediction, b), "alignment": tl.ALIGNMENT * alignment_loss}

    loader = [(batch(number).x, torch.tensor([number])) for number in range(STEPS)]
    sizes = {"num_batches": STEPS, "num_samples": STEPS * tl.ROWS, "batch_size": tl.ROWS}
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
        batch_size=tl.ROWS,
        log_local=False,
        log_every_n_steps=1,
        save_logs=False,
        wandb=False,
    )
    train_one_epoch(model, data, loss, 0, hook.optimizer, None, None, None, arguments)
    assert_same(weights(model), plain(kind))
    works("open_clip", kind)


def test_feature_surgery_several_times_in_one_model():
    """On two layers, one inside a checkpointed region, as two tensor hooks would; nowhere under no_grad."""
    first, second = torch.nn.Linear(6, 5).double(), torch.nn.Linear(5, 4).double()
    b, low = batch(0), torch.randn(tl.ROWS, 5, dtype=torch.float64)

    def tail(x, surgery):
        x, alignment_loss = surgery(first(x).tanh(), low, -low)
        return second(x), alignment_loss

    def loss(surgery, call):
        x, low_loss = call(tail, b.x, surgery)
        x, high_loss = surgery(x, b.harmful, b.beneficial, rule="full")
        return x.square().mean() + 0.3 * low_loss + 0.2 * high_loss

    params = [*first.parameters(), *second.parameters()]
    want = torch.autograd.grad(loss(reference.gradient_surgery, lambda f, *x: f(*x)), params)
    for call in (lambda f, *x: f(*x), partial(checkpoint, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(loss(gradient_surgery, call), params), want)
    with torch.no_grad():
        assert not loss(gradient_surgery, lambda f, *x: f(*x)).requires_grad
    frozen, alignment_loss = gradient_surgery(b.harmful, b.harmful, b.beneficial)
    assert torch.equal(frozen, b.harmful) and not (frozen.requires_grad or alignment_loss.requires_grad)


def test_feature_surgery_under_torch_func():
    b = batch(0)

    def loss(features, harmful, beneficial):
        seen, alignment_loss = gradient_surgery(features, harmful, beneficial)
        return seen.sin().sum() + 0.3 * alignment_loss

    features = torch.randn(tl.ROWS, 4, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(loss(features, b.harmful, b.beneficial), features)[0]
    inputs = (features.detach(), b.harmful, b.beneficial)
    torch.testing.assert_close(torch.func.grad(loss)(*inputs), want)
    rows = [torch.func.grad(loss)(*row) for row in zip(*inputs)]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*inputs), torch.stack(rows))
    with pytest.raises(NotImplementedError, match="jvp"):  # forward mode has no gradient to edit
        torch.func.jvp(lambda f: loss(f, *inputs[1:]), inputs[:1], inputs[:1])


def table() -> str:
    names = ["`gradient_surgery`", "`OptimizerSurgery`", "`SurgeryAdamW`", "`ObjectiveSurgery`"]
    rows = [["loop", *names], ["---"] * (1 + len(names))]
    rows += [[name, *(cells.get((loop, kind), "-") for kind in HOOKS)] for loop, name in LOOPS.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_documented_table_is_what_these_tests_found():
    """With DGS_WRITE_TABLE=1 the table is written into the document instead.

    Where tests were chosen, what those found is compared, and the names of the rows.
    """
    begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(begin)
    documented, tail = rest.split(end)
    if os.environ.get(WRITE):
        assert {loop for loop, _ in cells} == set(LOOPS), f"{WRITE}=1 needs all tests of this file"
        DOCUMENT.write_text(head + begin + table() + end + tail, encoding="utf-8")
        return
    rows = [line.strip("| ").split(" | ") for line in documented.splitlines()[2:]]
    assert [row[0] for row in rows] == list(LOOPS.values())
    told = {(loop, kind): cell for loop, row in zip(LOOPS, rows) for kind, cell in zip(HOOKS, row[1:])}
    assert {at: told[at] for at in cells} == cells, f"run this file with {WRITE}=1"
    if {loop for loop, _ in cells} == set(LOOPS):
        assert documented == table(), f"run this file with {WRITE}=1"
