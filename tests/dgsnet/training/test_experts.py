"""Experts and distillation in training: by the book, on several processes, killed, refused where unfit."""

import copy
import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import Config, ModelConfig, SurgeryConfig
from dgsnet.data.items import find_samples
from dgsnet.data.nuisances import NUISANCES, file_nuisances
from dgsnet.errors import UserError
from dgsnet.model import checkpoint
from dgsnet.training import experts
from dgsnet.training.experts import FileExpert
from dgsnet.training.log import METRICS_FILE
from dgsnet.training.plan import BRANCHES
from dgsnet.training.run import STATE_FILE
from dgsnet.training.setup import largest_batch
from dgsnet.training.step import Step, layer_surgery, parameter_groups
from dgsnet.training.train import train
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.dgsnet.training.test_distributed import STOPPED, assert_same_training, config_of, rows, run
from tests.dgsnet.training.test_training import _train_until, equal, weights
from tests.support.fresh import FORKSERVER

TRACKED = ("prior/drift", "prior/cka", "expert/residual_correlation", "distillation_loss", "nuisance_loss")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """17 images, as in test_distributed: real ones are JPEG but for one, generated ones PNG but for one."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    captions = {}
    for label, (name, count) in enumerate((("0_real", 9), ("1_fake", 8))):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            path = root / "train" / name / f"{i}.{'jpg' if (label == 0) != (i == 0) else 'png'}"
            Image.fromarray(rng.integers(0, 256, (36, 36 + i, 3), dtype=np.uint8)).save(path)
            captions[f"{name}/{path.name}"] = f"pattern {i % 3}"
    (root / "train" / "captions.json").write_text(json.dumps(captions))
    return root


def settings(dataset, batch_size=8, world=1, **changes):
    """Expert, distillation and files' nuisances at once; changes are named by section, as `optim_lr`."""
    config = config_of(dataset, batch_size, world, surgery={"text": "expert", "distillation": 0.3})
    for name, value in {"data_val": [], "data_nuisances": "files", **changes}.items():
        section, _, key = name.partition("_")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def expert_of(out):
    state = checkpoint.load_state(out / STATE_FILE)["expert"]
    return torch.cat([tensor.flatten() for _, tensor in sorted(state.items())])


def tracked(out):
    """What TensorBoard holds under the names in TRACKED, by step; of a step written twice the last."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = set(TRACKED) & set(events.Tags()["scalars"])
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """An uninterrupted run of one process to compare with."""
    config = settings(dataset)
    return train(config, tmp_path_factory.mktemp("runs") / "one"), config


# -- one step, by the book --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = checkpoint.DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="", lora_dropout=0.0)).double()
    for name, tensor in model.adapter_state().items():
        if "lora_B" in name:  # at zero A has no gradient
            tensor.normal_(std=0.05)
    return model


def _batch():
    torch.manual_seed(1)
    pixels, labels = torch.randn(8, 3, 32, 32).double(), (torch.arange(8) % 2).double()
    return (
        pixels,
        labels,
        [f"photo {'of grass ' * i}" for i in range(8)],
        torch.randn(8, len(NUISANCES)).double(),
    )


def _expert():
    expert = FileExpert().double()
    torch.manual_seed(2)
    for tensor in (expert.linear.weight.data, expert.linear.bias.data, expert.mean):
        tensor.normal_()
    return expert


def _naive_step(model, expert, surgery, pixels, labels, captions, nuisances):
    """Gradients of one step written out: explicit reference gradients, losses and projections."""
    head = model.head
    student = model.student_features(pixels)
    teacher = model.teacher_features(pixels).requires_grad_()
    text = model.text_features(captions).requires_grad_()
    image_z, teacher_z, text_z = (
        h(x).squeeze(1)
        for h, x in ((head.image_head, student), (head.teacher_head, teacher), (head.text_head, text))
    )
    nuisance_z = expert.linear((nuisances - expert.mean) / expert.deviation).squeeze(1)
    bce = F.binary_cross_entropy_with_logits
    offsets = nuisance_z.detach() + (0 if surgery.text == "project" else text_z.detach())
    (g_text,) = torch.autograd.grad(bce(text_z, labels), text, retain_graph=True)
    (g_img,) = torch.autograd.grad(bce(teacher_z, labels), teacher)
    rescale = len(labels) / surgery.reference_batch_size
    task = bce(image_z + offsets, labels)
    task = task + surgery.alignment * (student * (g_img * rescale).clamp(max=0)).sum(1).mean()
    pull = surgery.distillation * ((student - teacher.detach()) ** 2).mean() / 2
    gradients = {}
    for branch, loss in ((head.image_head, task), (head.text_head, bce(text_z, labels))):
        gradients |= zip(
            branch.parameters(), torch.autograd.grad(loss, list(branch.parameters()), retain_graph=True)
        )
    own = list(expert.parameters())
    gradients |= zip(own, torch.autograd.grad(bce(nuisance_z, labels), own))
    layers = {}
    for name, parameter in model.visual.named_parameters():
        if "lora_" in name:
            layers.setdefault(name.split(".lora_")[0], []).append(parameter)
    if surgery.mode == "layer":
        for tensors in layers.values():
            found = []
            for output, vector in ((task, None), (student, g_text.clamp(min=0))):
                parts = torch.autograd.grad(output, tensors, vector, retain_graph=True)
                found.append(torch.cat([part.flatten() for part in parts]))
            direction = found[1] / (found[1].norm() + surgery.eps)
            whole = found[0] - (found[0] @ direction) * direction
            gradients |= zip(tensors, whole.split([t.numel() for t in tensors]))
        return gradients
    (edited,) = torch.autograd.grad(task, student, retain_graph=True)
    if surgery.text != "expert":
        harmful = (g_text * rescale).clamp(min=0)
        direction = harmful / (harmful.norm(dim=1, keepdim=True) + surgery.eps)
        edited = edited - (edited * direction).sum(1, keepdim=True) * direction
    edited = edited + torch.autograd.grad(pull, student, retain_graph=True)[0]
    adapters = [tensor for tensors in layers.values() for tensor in tensors]
    return gradients | dict(zip(adapters, torch.autograd.grad(student, adapters, edited)))


CASES = [
    ("feature", "expert", 0.3),
    ("feature", "both", 0.3),
    ("feature", "project", 0.3),
    ("layer", "both", 0.0),
]


@pytest.mark.parametrize("scaled", [False, True], ids=["whole", "accumulated and scaled"])
@pytest.mark.parametrize(("mode", "text", "distillation"), CASES)
def test_a_step_equals_the_naive_computation(model, mode, text, distillation, scaled):
    surgery = SurgeryConfig(mode=mode, text=text, distillation=distillation, reference_batch_size=4, eps=1e-3)
    expert, batch = _expert(), _batch()
    step = Step(model, BRANCHES, surgery, expert=expert)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    optimizer = torch.optim.SGD(parameter_groups(model, expert), lr=1e-3)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0  # the model is shared
    operator = layer_surgery(optimizer, surgery, scaler) if mode == "layer" else None
    expected = _naive_step(model, expert, surgery, *batch)
    optimizer.zero_grad()
    scale = scaler.scale if scaler else lambda loss: loss
    start = 0
    # The reference batch size divides neither part.
    for size in (5, 3) if scaled else (8,):
        pixels, labels, captions, nuisances = (x[start : start + size] for x in batch)
        loss, _, harmful, _ = step(pixels, labels, model.text_features(captions), nuisances)
        scale(loss * size / 8).backward(retain_graph=harmful is not None)
        if operator:
            with operator.harmful():
                scale(harmful * size / 8).backward()
        start += size
    if scaler:
        scaler.step(optimizer)
    else:
        optimizer.step()
    assert set(expected) == {p for p in step.parameters() if p.requires_grad}
    for parameter, gradient in expected.items():
        difference = (parameter.grad.flatten() - gradient.flatten()).norm()
        assert difference <= 1e-10 * gradient.norm() + 1e-15


def test_a_step_in_half_precision_is_near_the_full_one(model):
    """fp16 is autocast with a loss scale; training refuses it without a GPU, the step itself runs."""
    surgery = SurgeryConfig(text="both", distillation=0.3)
    gradients = []
    for half in (False, True):
        step = Step(copy.deepcopy(model).float(), BRANCHES, surgery, expert=_expert().float())
        pixels, labels, captions, nuisances = _batch()
        with torch.no_grad():
            text = step.model.text_features(captions)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss, values, _, moments = step(pixels.float(), labels.float(), text, nuisances.float())
        assert loss.dtype == values.dtype == torch.float32 and moments.isfinite().all()
        (loss * 2.0**10).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters() if p.requires_grad]))
    assert gradients[1].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


# -- whole runs -------------------------------------------------------------------------------------------


def test_the_expert_learns_from_files_and_stays_out_of_the_detector(one, dataset):
    out, config = one
    expert = FileExpert()
    expert.load_state_dict(checkpoint.load_state(out / STATE_FILE)["expert"])
    samples = find_samples(dataset, "train")
    found = torch.from_numpy(np.stack([file_nuisances(s.read_bytes()) for s in samples]))
    png = torch.tensor([s.path.endswith("png") for s in samples])
    assert ((expert(found) > 0) == png).all()
    assert (
        load_file(out / "last" / "adapters.safetensors").keys()
        == checkpoint.trained_state(checkpoint.build_model(config, with_text=False)).keys()
    )


def test_tensorboard_tells_how_far_the_features_have_moved(one):
    values = tracked(one[0])
    assert set(values) == set(TRACKED)
    assert all(set(steps) == {6, 9} for steps in values.values())  # of stage 2 alone
    assert 0 < values["prior/drift"][6] < values["prior/drift"][9]
    assert 0 < values["prior/cka"][9] < values["prior/cka"][6] <= 1
    assert all(-1 <= value <= 1 for value in values["expert/residual_correlation"].values())
    assert values["nuisance_loss"][9] < values["nuisance_loss"][6] < np.log(2)
    assert values["distillation_loss"][6] > 0


def test_accumulation_trains_as_one_batch(one, dataset, tmp_path):
    out = train(settings(dataset, batch_size=4, optim_accumulation=2), tmp_path / "run")
    assert_same_training(out, *one)
    torch.testing.assert_close(expert_of(out), expert_of(one[0]), rtol=1e-3, atol=1e-4)


def test_bf16_trains_nearly_as_fp32(one, dataset, tmp_path):
    out = train(settings(dataset, optim_precision="bf16"), tmp_path / "run")
    torch.testing.assert_close(expert_of(out), expert_of(one[0]))  # which sees no backbone
    for low, full in zip(rows(out), rows(one[0]), strict=True):
        assert float(low["loss"]) == pytest.approx(float(full["loss"]), rel=0.05)
    assert 0 < tracked(out)["prior/drift"][9] < 2 * tracked(one[0])["prior/drift"][9]


def test_two_processes_train_as_one(one, dataset, tmp_path):
    """The last step of an epoch has one image, so the second process has neither pixels nor nuisances."""
    assert run(2, tmp_path / "two", settings(dataset, world=2)) == 0
    assert_as_one(tmp_path / "two", one)


def test_sharded_and_stopped_they_go_on_as_two_and_as_one(one, dataset, tmp_path):
    out = tmp_path / "two"
    assert run(2, out, settings(dataset, world=2), checkpoints=4, parallel="fsdp") == STOPPED
    alone = shutil.copytree(out, tmp_path / "alone")
    assert run(2, out, parallel="fsdp") == run(1, alone) == 0
    assert_as_one(out, one)
    assert_as_one(alone, one)


def assert_as_one(out, one):
    assert_same_training(out, *one)
    torch.testing.assert_close(expert_of(out), expert_of(one[0]), rtol=1e-3, atol=1e-4)
    for name, steps in tracked(one[0]).items():
        if name != "prior/cka":  # unbiased whatever the micro-batch, but another estimate
            assert tracked(out)[name] == pytest.approx(steps, rel=5e-3, abs=1e-5), name


def test_killed_and_resumed_it_ends_with_the_same_weights_and_log(one, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(json.dumps(one[1].to_dict()))
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(out), "--resume"]
    # Within the first checkpoint of stage 2, then in the next one, then never.
    codes = []
    started = FORKSERVER.Event()
    for fatal_call in (45, 20, 0):
        child = FORKSERVER.Process(target=_train_until, args=(command, fatal_call, started))
        child.start()
        child.join()
        codes.append(child.exitcode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert equal(weights(out), weights(one[0]))
    assert (out / METRICS_FILE).read_bytes() == (one[0] / METRICS_FILE).read_bytes()
    assert torch.equal(expert_of(out), expert_of(one[0]))
    assert tracked(out) == tracked(one[0])


def test_files_alone_are_an_expert(dataset, tmp_path):
    """Without captions; what the student learns is another than without the expert."""
    updates = []
    for nuisances in ("none", "files"):
        config = settings(
            dataset,
            data_captions="none",
            data_nuisances=nuisances,
            surgery_text="project" if nuisances == "none" else "expert",
            optim_max_steps=2,
        )
        updates.append(load_file(train(config, tmp_path / nuisances) / "last" / "adapters.safetensors"))
    name = "head.image_head.weight"
    assert not torch.equal(updates[0][name], updates[1][name])


def test_the_largest_batch_is_found_with_experts(dataset):
    assert largest_batch(settings(dataset), torch.device("cpu"), start=4) == 4


# -- the expert and its statistics ------------------------------------------------------------------------


def test_nuisances_are_standardised_over_the_training_files(dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset / "train", tmp_path / "train")
    (tmp_path / "train" / "0_real" / "damaged.png").write_bytes(b"no image")
    samples = find_samples(tmp_path, "train")
    good = [s for s in samples if "damaged" not in s.path]
    expert = FileExpert()
    expert.standardise(samples)
    found = np.stack([file_nuisances(s.read_bytes()) for s in good]).astype(np.float64)
    np.testing.assert_allclose(expert.mean, found.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        expert.deviation, np.maximum(found.std(axis=0), experts.LEAST_DEVIATION), rtol=1e-6
    )
    monkeypatch.setattr(experts, "MOST_FILES", 6)
    expert.standardise(good)
    np.testing.assert_allclose(expert.mean, found[::3].mean(axis=0), rtol=1e-6)


# -- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_captions": "none", "data_nuisances": "none"}, "text=expert has no expert .*nuisances=files"),
        ({"surgery_mode": "none"}, "surgery.text=expert needs the three branches"),
        ({"model_lora_rank": 0, "surgery_text": "project"}, "distillation=0.3 needs the three branches"),
        (
            {"surgery_mode": "none", "surgery_text": "project", "surgery_distillation": 0.0},
            "data.nuisances=files needs the three branches",
        ),
    ],
)
def test_experts_that_nothing_makes_or_uses_are_refused(dataset, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(settings(dataset, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"mode": "layer", "distillation": 0.1},
            "surgery.distillation=0.1 goes with surgery.mode=feature only",
        ),
        ({"mode": "layer", "text": "expert"}, "surgery.text=expert leaves nothing .* text=both"),
        ({"distillation": -1.0}, "distillation=-1.0 must be at least 0"),
        ({"distillation": float("inf")}, "distillation=inf must be finite"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SurgeryConfig(**setting)


def test_runs_of_before_are_read_and_go_on(dataset, tmp_path):
    changes = {"surgery_text": "project", "surgery_distillation": 0.0, "data_nuisances": "none"}
    config = settings(dataset, optim_max_steps=1, **changes)
    out = train(config, tmp_path / "run")
    expected = (out / "last" / "adapters.safetensors").read_bytes()
    saved = json.loads((out / "config.json").read_text())
    for section, name in (("surgery", "text"), ("surgery", "distillation"), ("data", "nuisances")):
        del saved[section][name]
    for folder in (out, out / "last"):
        (folder / "config.json").write_text(json.dumps(saved))
    assert Config.load(out / "config.json") == config
    assert checkpoint.load_model(out / "last")[1] == config
    state = checkpoint.load_state(out / STATE_FILE)
    del state["expert"], state["moments"]
    checkpoint.save_state(out / STATE_FILE, state | {"position": {"stage": 2, "step": 3}, "optimizer": None})
    train(config, out, resume=True)
    assert (out / "last" / "adapters.safetensors").read_bytes() != expected  # it has trained on
