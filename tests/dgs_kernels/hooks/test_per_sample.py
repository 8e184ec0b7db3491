"""Every sample's loss as an objective: the same gradients as one backward for each, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dgs_kernels import ObjectiveSurgery

SAMPLES = 5


class Net(nn.Module):
    """Every kind of layer, one of them called twice, and an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12, padding_idx=3)
        self.norm, self.norm_of_squares = nn.LayerNorm(12), nn.RMSNorm(12)
        self.linear, self.plain = nn.Linear(12, 12), nn.Linear(12, 24, bias=False)
        self.grouped, self.same = (
            nn.Conv1d(12, 12, 3, padding=1, groups=3),
            nn.Conv1d(24, 12, 4, padding="same"),
        )
        self.norm_of_groups = nn.GroupNorm(4, 12)
        self.image = nn.Conv2d(3, 12, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2))
        self.depthwise = nn.Conv2d(12, 12, 3, padding="valid", groups=12)
        self.head = nn.Linear(12, 1)

    def forward(self, words, images):
        x = self.linear(self.linear(self.norm(self.table(words))))
        x = self.same(self.plain(self.norm_of_squares(x)).mT)
        x = self.norm_of_groups(self.grouped(x)).relu().mean(2)
        y = self.depthwise(torch.relu_(self.image(images))).mean((2, 3))
        return self.head(x + y).squeeze(1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(20, (SAMPLES, 7), generator=generator)
    return words, torch.randn(SAMPLES, 3, 11, 9, generator=generator, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return Net().double()


def surgery_of(model, weighting="upgrad", granularity="model", **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    return ObjectiveSurgery(optimizer, weighting, granularity, model=model, **options), optimizer


def take(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_the_same_as_one_backward_for_each_sample(batch, granularity):
    model = net()
    surgery, optimizer = surgery_of(model, granularity=granularity)
    with surgery.record():
        losses = model(*batch).square()
    surgery.per_sample(losses)
    ours, metrics = take(model), surgery.metrics()
    surgery.remove()
    surgery = ObjectiveSurgery(optimizer, "upgrad", granularity, model=model)
    for one in zip(*batch):
        with surgery.objective():
            model(*(x[None] for x in one)).square().sum().backward()
    surgery.combine()
    theirs, expected = take(model), surgery.metrics()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert metrics.gramian.shape == (len(metrics.layers), SAMPLES, SAMPLES)
    assert metrics.objectives[3] == "sample 3" and set(metrics.layers) == set(expected.layers)
    of = dict(zip(expected.layers, expected.gramian))
    for layer, products in zip(metrics.layers, metrics.gramian):
        torch.testing.assert_close(products, of[layer], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_both_ways_of_finding_inner_products(rows):
    """Few rows: by pairs; many: by slices of the gradients."""
    torch.manual_seed(rows)
    model = nn.Linear(40, 30, dtype=torch.float64)
    x = torch.randn(SAMPLES, rows, 40, dtype=torch.float64)
    surgery, _ = surgery_of(model, "mean", "tensor")
    with surgery.record():
        losses = model(x).sin().sum((1, 2))
    surgery.per_sample(losses)
    asked = model(x).detach().cos()
    gradients = (asked.mT @ x).flatten(1)
    torch.testing.assert_close(surgery.metrics().gramian[0], gradients @ gradients.T)
    torch.testing.assert_close(model.weight.grad.flatten(), gradients.mean(0))


def test_memory_does_not_grow_with_samples_times_parameters():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
            return out

    model, x = nn.Linear(600, 500, bias=False), torch.randn(64, 50, 600)
    surgery, _ = surgery_of(model, "mean")
    with surgery.record():
        losses = model(x).square().sum((1, 2))
    with Largest() as largest:
        surgery.per_sample(losses)
    assert largest.numbers < 2 * 64 * 50 * 600 < 64 * 600 * 500
    gradients = (2 * model(x).detach().mT @ x).flatten(1)
    torch.testing.assert_close(surgery.metrics().gramian[0], gradients @ gradients.T, rtol=1e-3, atol=1)


def test_gradients_add_up_and_one_sample_is_its_own(batch):
    model = net()
    surgery, _ = surgery_of(model, "mean")
    for part in ([0, 1], [2], [3, 4]):
        with surgery.record():
            losses = model(*(x[part] for x in batch)).square() * len(part)
        surgery.per_sample(losses)
    added = take(model)
    model(*batch).square().sum().backward()
    torch.testing.assert_close(added, take(model))


def test_a_scaled_loss_in_half_precision():
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1)), torch.randn(SAMPLES, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = surgery_of(model, scaler=scaler), surgery_of(model)
    found = []
    for (surgery, _), factor in ((scaled, 2.0**10), (plain, 1.0)):
        with surgery.record(), torch.autocast("cpu", torch.bfloat16):
            losses = model(x).squeeze(1).float().square()
        surgery.per_sample(scaler.scale(losses) if factor > 1 else losses)
        found.append({name: grad / factor for name, grad in take(model).items()})
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)
    grams = [surgery.metrics().gramian for surgery, _ in (scaled, plain)]
    torch.testing.assert_close(*grams, rtol=1e-2, atol=1e-4)


def test_what_is_frozen_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    surgery, optimizer = surgery_of(model, granularity="tensor")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with surgery.record():
        losses = model(torch.randn(SAMPLES, 4)).squeeze(1)
    surgery.per_sample(losses)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.bias", "2.weight", "2.bias"}


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x + self.token)


class Bypassed(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x.argmax(1))).mean(1, keepdim=True)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x[None].expand(2, -1, -1)).mean(0)


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        y = x * 1
        z = self.first(y)
        y.mul_(2)
        return self.second(z + y)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (Token, NotImplementedError, "token is not used by calling a layer"),
        (lambda: nn.Sequential(Bypassed(4, 1)), NotImplementedError, "0.weight is not used by calling"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 1)),
            NotImplementedError,
            "1.weight",
        ),
        (Tied, NotImplementedError, "table.weight is shared by layers of different kinds"),
        (Turned, ValueError, "first dimension of linear .Linear. must be the 5 samples"),
        (Changed, RuntimeError, "first .Linear. was given was changed in place"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)),
            RuntimeError,
            "depends on others at 0 .Linear.",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), None, ""),
    ],
)
def test_what_would_be_wrong_is_refused(model, error, words):
    torch.manual_seed(3)
    model = model()
    surgery, _ = surgery_of(model)
    with surgery.record():
        losses = model(torch.randn(SAMPLES, 4)).flatten()
    if error is None:
        return surgery.per_sample(losses)
    with pytest.raises(error, match=words):
        surgery.per_sample(losses)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_called_wrongly_is_refused(batch):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass model="), ObjectiveSurgery(optimizer).record():
        pass
    surgery, _ = surgery_of(model)
    x = torch.randn(SAMPLES, 4)
    with pytest.raises(RuntimeError, match=r"inside record\(\) first"):
        surgery.per_sample(model(x).squeeze(1))
    with surgery.record():
        pass
    with pytest.raises(RuntimeError, match="no layer was recorded"):
        surgery.per_sample(model(x).squeeze(1))
    for losses in (torch.ones(3), model(x), model(x).sum(), None):
        with pytest.raises(ValueError, match=r"losses must be a tensor \[B\] with a graph"):
            surgery.per_sample(losses)
    with surgery.objective():
        model(x).sum().backward()
    with surgery.record():
        losses = model(x).squeeze(1)
    with pytest.raises(RuntimeError, match=r"no objective\(\) beside it"):
        surgery.per_sample(losses)
