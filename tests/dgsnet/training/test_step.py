"""One step of stage 2 by the book: explicit reference gradients, losses and projections."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import ModelConfig, SurgeryConfig
from dgsnet.data.nuisances import NUISANCES
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.experts import FileExpert
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import TRAIN_COLUMNS, Step, layer_surgery, parameter_groups

IMAGES = 9
# The micro-batches have these sizes, neither of which is the reference batch size or a multiple of it.
PARTS = (5, 4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="", lora_dropout=0.0)).double()
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:
            # With B at zero A has no gradient.
            tensor.normal_(std=0.05)
    return model


def batch():
    """Pixels, labels (a third generated), captions and nuisances."""
    torch.manual_seed(1)
    return (
        torch.randn(IMAGES, 3, 32, 32).double(),
        (torch.arange(IMAGES) % 3 == 1).double(),
        [f"photo {'of grass ' * i}" for i in range(IMAGES)],
        torch.randn(IMAGES, len(NUISANCES)).double(),
    )


def expert_on_files():
    expert = FileExpert().double()
    torch.manual_seed(2)
    for tensor in (expert.linear.weight.data, expert.linear.bias.data, expert.mean):
        tensor.normal_()
    expert.deviation.uniform_(0.5, 2.0)
    return expert


def naive_step(model, expert, surgery, pixels, labels, captions, nuisances):
    """The losses of one step and the gradient of every parameter that it trains, written out.

    Returns:
        dict of TRAIN_COLUMNS to values, dict of parameter to gradient.
    """
    head, bce = model.head, F.binary_cross_entropy_with_logits
    student = model.student_features(pixels)
    teacher = model.teacher_features(pixels).requires_grad_()
    image_logits = head.image_head(student).squeeze(1)
    rescale = len(labels) / surgery.reference_batch_size
    (g_teacher,) = torch.autograd.grad(bce(head.teacher_head(teacher).squeeze(1), labels), teacher)
    alignment_loss = (student * (g_teacher * rescale).clamp(max=0)).sum(1).mean()
    pull = surgery.distillation * ((student - teacher.detach()) ** 2).mean() / 2

    offsets, losses_of_experts, gradients = 0.0, [pull.detach()], {}
    text_loss = g_text = None
    if captions is not None:
        text = model.text_features(captions).requires_grad_()
        text_logits = head.text_head(text).squeeze(1)
        text_loss = bce(text_logits, labels)
        (g_text,) = torch.autograd.grad(text_loss, text, retain_graph=True)
        own = list(head.text_head.parameters())
        gradients |= zip(own, torch.autograd.grad(text_loss, own))
        if surgery.text != "project":
            offsets = offsets + text_logits.detach()
    if expert is not None:
        logits = expert.linear((nuisances - expert.mean) / expert.deviation).squeeze(1)
        own = list(expert.parameters())
        gradients |= zip(own, torch.autograd.grad(bce(logits, labels), own))
        losses_of_experts.append(bce(logits, labels).detach())
        offsets = offsets + logits.detach()
    image_loss = bce(image_logits + offsets, labels)
    task = image_loss + surgery.alignment * alignment_loss
    own = list(head.image_head.parameters())
    gradients |= zip(own, torch.autograd.grad(task, own, retain_graph=True))

    layers = {}
    for name, parameter in model.visual.named_parameters():
        if "lora_" in name:
            layers.setdefault(name.split(".lora_")[0], []).append(parameter)
    if surgery.mode == "layer":
        for tensors in layers.values():
            found = torch.autograd.grad(task, tensors, retain_graph=True)
            edited = torch.cat([part.flatten() for part in found])
            if g_text is not None:
                harmful = torch.autograd.grad(student, tensors, g_text.clamp(min=0), retain_graph=True)
                harmful = torch.cat([part.flatten() for part in harmful])
                direction = harmful / (harmful.norm() + surgery.eps)
                edited = edited - (edited @ direction) * direction
            gradients |= zip(tensors, edited.split([t.numel() for t in tensors]))
    else:
        (edited,) = torch.autograd.grad(task, student, retain_graph=True)
        if g_text is not None and surgery.text != "expert":
            harmful = (g_text * rescale).clamp(min=0)
            direction = harmful / (harmful.norm(dim=1, keepdim=True) + surgery.eps)
            edited = edited - (edited * direction).sum(1, keepdim=True) * direction
        edited = edited + torch.autograd.grad(pull, student, retain_graph=True)[0]
        adapters = [tensor for tensors in layers.values() for tensor in tensors]
        gradients |= dict(zip(adapters, torch.autograd.grad(student, adapters, edited)))
    losses = {
        "loss": task + (text_loss if text_loss is not None else 0) + sum(losses_of_experts),
        "image_loss": image_loss,
        "text_loss": torch.zeros(()) if text_loss is None else text_loss,
        "alignment_loss": alignment_loss,
        "accuracy": ((image_logits > 0) == (labels > 0.5)).double().mean(),
    }
    return {name: loss.item() for name, loss in losses.items()}, gradients


# Kind of surgery, what captions do, distillation, whether there are captions and an expert on files.
CASES = [
    ("feature", "expert", 0.3, True, True),
    ("feature", "both", 0.3, True, True),
    ("feature", "project", 0.3, True, True),
    ("feature", "expert", 0.0, False, True),
    ("layer", "both", 0.0, True, True),
    ("layer", "both", 0.0, False, True),
    ("layer", "project", 0.0, True, False),
]


@pytest.mark.parametrize("scaled", [False, True], ids=["whole", "accumulated and scaled"])
@pytest.mark.parametrize(("mode", "text", "distillation", "captioned", "with_expert"), CASES)
def test_a_step_equals_the_naive_computation(model, mode, text, distillation, captioned, with_expert, scaled):
    surgery = SurgeryConfig(
        mode, alignment=0.35, text=text, distillation=distillation, reference_batch_size=7, eps=1e-3
    )
    expert, (pixels, labels, captions, nuisances) = expert_on_files() if with_expert else None, batch()
    captions = captions if captioned else None
    step = Step(model, BRANCHES, surgery, captioned, expert)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    optimizer = torch.optim.SGD(parameter_groups(model, expert), lr=1e-3)
    for group in optimizer.param_groups:
        # The tests share the model, so no step may change it.
        group["lr"] = 0.0
    operator = layer_surgery(optimizer, surgery, scaler=scaler) if mode == "layer" else None
    losses, gradients = naive_step(model, expert, surgery, pixels, labels, captions, nuisances)
    optimizer.zero_grad()
    scale = scaler.scale if scaler else lambda loss: loss
    start, logged = 0, 0.0
    for size in PARTS if scaled else (IMAGES,):
        part = slice(start, start + size)
        features = model.text_features(captions[part]) if captions else None
        loss, values, harmful, _ = step(
            pixels[part], labels[part], features, nuisances[part] if expert else None
        )
        scale(loss * size / IMAGES).backward(retain_graph=harmful is not None)
        if operator and harmful is not None:
            with operator.harmful():
                scale(harmful * size / IMAGES).backward()
        logged = logged + values * size / IMAGES
        start += size
    if scaler:
        scaler.step(optimizer)
    else:
        optimizer.step()
    for name, value in zip(TRAIN_COLUMNS, logged.tolist(), strict=True):
        assert value == pytest.approx(losses[name], rel=1e-6), name
    assert set(gradients) == {p for p in step.parameters() if p.requires_grad}
    for parameter, gradient in gradients.items():
        difference = (parameter.grad.flatten() - gradient.flatten()).norm()
        assert difference <= 1e-10 * gradient.norm() + 1e-15
    if operator and captioned:
        metrics = operator.metrics()
        assert len(metrics.layers) == 3 * 4 and all(name.endswith("_proj") for name in metrics.layers)
        # There was something to remove.
        assert metrics.removed.max() > 1e-3


@pytest.mark.parametrize("surgery", [None, SurgeryConfig(reference_batch_size=6)])
def test_losses_see_smoothed_labels(model, surgery):
    pixels, labels, *_ = batch()
    text = None if surgery is None else torch.randn(IMAGES, model.dim).double()
    smoothed = Step(model, BRANCHES, surgery, smoothing=0.2)(pixels, labels, text)
    by_hand = Step(model, BRANCHES, surgery)(pixels, 0.8 * labels + 0.1, text)
    assert torch.equal(smoothed.values, by_hand.values)
    hard = Step(model, BRANCHES, surgery)(pixels, labels, text)
    # The last value is the accuracy.
    assert smoothed.loss != hard.loss and smoothed.values[-1] == hard.values[-1]


@pytest.mark.parametrize("surgery", [SurgeryConfig(text="both", distillation=0.3), SurgeryConfig("layer")])
def test_a_step_in_half_precision_is_near_the_full_one(model, surgery):
    """fp16 is autocast with a loss scale; training refuses it without a GPU, the step itself runs."""
    gradients = []
    for half in (False, True):
        step = Step(copy.deepcopy(model).float(), BRANCHES, surgery, expert=expert_on_files().float())
        pixels, labels, captions, nuisances = batch()
        with torch.no_grad():
            text = step.model.text_features(captions)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss, values, _, moments = step(pixels.float(), labels.float(), text, nuisances.float())
        assert loss.dtype == values.dtype == torch.float32 and moments.isfinite().all()
        # What the text branch is given is in fp32, and so are its head and loss.
        text_logits = step.model.head.text_head(text).squeeze(1)
        text_loss = F.binary_cross_entropy_with_logits(text_logits, labels.float())
        assert values[TRAIN_COLUMNS.index("text_loss")].item() == pytest.approx(text_loss.item(), rel=1e-6)
        (loss * 2.0**10).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters() if p.requires_grad]))
    assert gradients[1].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()
