"""Every hook in every loop of one process, against the same computation done plainly."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from tests.dgs_kernels.hooks.table import check, refused, works
from tests.dgs_kernels.hooks.training_loops import (
    MAX_NORM,
    STEPS,
    SURGERY,
    Hook,
    Net,
    adamw,
    assert_same,
    batch,
    hooks,
    plain,
    reference_loss,
    scaled,
    task_loss,
    train,
    weights,
)


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
    assert_same(weights(model), plain(kind, clip="before"))
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
        # Hooks run in the order in which they were registered.
        hook.optimizer.register_step_pre_hook(clip)
    train(hook, model, before_step=clip if kind == "features" else None)
    assert_same(weights(model), plain(kind, clip="after"))
    works("clip_after", kind)


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
def test_fused_scaler(kind):
    """A fused optimiser unscales inside its step, too late for surgery on parameters."""
    if kind == "SurgeryAdamW":
        with refused("fused_scaler", kind, "use OptimizerSurgery", ValueError):
            Hook(kind, Net(torch.float32), fused=True)
        return
    model, scaler, hook, step = scaled(kind, make=partial(adamw, fused=True))
    options = {"backward": lambda loss: scaler.scale(loss).backward(), "dtype": torch.float32, "step": step}
    if kind != "features":
        with refused("fused_scaler", kind, "call scaler.unscale_(optimizer) before scaler.step(optimizer)"):
            train(hook, model, **options)
        model, scaler, hook, options["step"] = scaled(kind, make=partial(adamw, fused=True))
        # This is the remedy that the message names.
        train(hook, model, before_step=lambda: scaler.unscale_(hook.optimizer), **options)
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
        # The reentrant kind needs an input that requires a gradient.
        x = x.requires_grad_()
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


def muon(params):
    """Of the matrices, which is what it takes; the rest keeps still."""
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.3)


@pytest.mark.parametrize("kind", ["features", "parameters", "objectives"])
def test_muon(kind):
    """It computes in bfloat16."""
    model = Net()
    train(Hook(kind, model, make=muon), model)
    for p, want, start in zip(model.parameters(), plain(kind, make=muon), Net().parameters()):
        torch.testing.assert_close(p, want, rtol=2e-2, atol=2e-3)
        assert p.ndim == 1 or (p - start).norm() > 0.3
    works("muon", kind)


def test_the_documented_table_is_what_these_tests_found():
    check(__file__)
