"""Wrong arguments: the way past torch's dispatcher refuses what the way through it refuses, in its words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import dgs_kernels
from dgs_kernels import (
    ObjectiveSurgery,
    OptimizerSurgery,
    SurgeryAdamW,
    SurgeryHead,
    backends,
    gradient_surgery,
    private_torch,
    project_align_,
)
from dgs_kernels.ops import surgery_adamw_

NAN, INF = float("nan"), float("inf")
NO_TENSOR = {
    "none": None,
    "list": [[1.0, 2.0]],
    "array": np.zeros((3, 4), np.float32),
    "sparse": torch.zeros(3, 4).to_sparse(),
    "complex": torch.zeros(3, 4, dtype=torch.complex64),
    "integers": torch.zeros(3, 4, dtype=torch.long),
    "elsewhere": torch.zeros(3, 4, device="meta"),
}
NO_OPTION = {
    "eps": ("x", None, 0.0, NAN, INF, torch.tensor(1e-6)),
    "order": ("first", None, 0),
    "rule": ("half", None, 1),
    "alignment": ("x", None, NAN, INF, [1.0], torch.ones(1), torch.tensor(1j)),
}


def rows():
    return torch.arange(12.0).reshape(3, 4) - 5


def case(operation, **change):
    ((name, value),) = change.items()
    return pytest.param(operation, change, id=f"{operation}-{name}-{str(value)[:24]!r}")


def valid(operation):
    """Arguments that are served, by name."""
    x = rows()
    if operation == "project_align":
        return {"grad": x, "harmful": x + 1, "beneficial": x - 1}
    if operation == "project_align_":
        return {"grads": [x], "harmful": [x + 1], "beneficial": [x - 1]}
    if operation == "gramian":
        return {"objectives": [[x], [x + 1]]}
    if operation == "combine_":
        return {"grads": [x], "objectives": [[x + 1], [x - 1]], "weights": torch.ones(2)}
    if operation == "spectral_entropy":
        return {"images": torch.rand(1, 3, 64, 64)}
    if operation == "surgery_head":
        heads = {f"{which}_weight": torch.ones(1, 4) for which in ("image", "teacher", "text")}
        heads |= {f"{which}_bias": torch.zeros(1) for which in ("image", "teacher", "text")}
        return {"features": x, "teacher_features": x, "text_features": x, "labels": torch.ones(3)} | heads
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    lists = {name: [rows()] for name in names} | {"steps": [torch.tensor(0.0)]}
    surgery = {"harmful": [x + 1], "beneficial": [], "groups": [0], "sums": torch.zeros(1, 6), "scale": None}
    options = {"alignment": 1.0, "surgery_eps": 1e-6, "order": "align_first", "rule": "full", "part": "all"}
    adam = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
    return lists | surgery | options | adam


def call(operation, arguments):
    if operation == "surgery_adamw_":
        return surgery_adamw_.run(*arguments.values())
    return getattr(dgs_kernels, operation)(**arguments)


CASES = [
    *(
        case("project_align", **{name: value})
        for name in ("grad", "harmful", "beneficial")
        for what, value in NO_TENSOR.items()
        if (name, what) != ("beneficial", "none")
    ),
    *(case("project_align", **{name: value}) for name, values in NO_OPTION.items() for value in values),
    *(case("project_align", harmful=torch.zeros(shape)) for shape in ((3,), (1, 3, 4), (2, 4), ())),
    *(case("project_align", grad=torch.zeros(shape)) for shape in ((), (3, 0))),
    *(
        case("project_align_", **{name: [value]})
        for name in ("grads", "harmful", "beneficial")
        for value in NO_TENSOR.values()
    ),
    *(case("project_align_", **{name: rows()}) for name in ("grads", "harmful", "beneficial")),
    *(case("project_align_", **{name: value}) for name, values in NO_OPTION.items() for value in values),
    case("project_align_", harmful=[]),
    case("project_align_", harmful=[torch.zeros(4, 3)]),
    case("project_align_", groups=[0, 0]),
    *(
        case("surgery_head", **{name: value})
        for name in ("features", "teacher_features", "text_features", "image_weight", "text_bias")
        for what, value in NO_TENSOR.items()
        if (name, what) != ("text_features", "none")
    ),
    *(case("surgery_head", **{f"{which}_weight": torch.ones(4)}) for which in ("image", "teacher", "text")),
    *(case("surgery_head", **{f"{which}_bias": torch.ones(())}) for which in ("image", "teacher", "text")),
    *(case("surgery_head", labels=value) for value in (None, [1, 0, 1], torch.ones(3, 1), torch.ones(2))),
    *(case("surgery_head", labels=torch.tensor([0, 1, value])) for value in (-1, 2, 1.5, NAN)),
    *(case("surgery_head", offsets=value) for value in ([0.0] * 3, torch.zeros(3, 1), torch.zeros(2))),
    *(case("surgery_head", eps=value) for value in NO_OPTION["eps"]),
    *(case("surgery_head", order=value) for value in NO_OPTION["order"]),
    *(case("surgery_head", reference_batch_size=value) for value in (0, 2.5, "x", -1)),
    *(case("surgery_head", distillation=value) for value in ("x", None, NAN, -1.0, INF)),
    *(case("spectral_entropy", images=value) for value in NO_TENSOR.values()),
    *(case("spectral_entropy", patch_size=value) for value in (0, "x", None, 32.0)),
    *(
        case(operation, objectives=[[rows()], [value]])
        for operation in ("gramian", "combine_")
        for value in (*NO_TENSOR.values(), torch.zeros(4, 3))
    ),
    *(case("gramian", objectives=value) for value in ([[rows()]], [[rows()], []])),
    *(case("combine_", grads=[value]) for value in (*NO_TENSOR.values(), torch.zeros(4, 3))),
    *(case("combine_", weights=value) for value in (None, [1.0, 1.0], torch.ones(3), torch.ones(1, 3))),
    case("surgery_adamw_", exp_avgs=[torch.zeros(4, 3)]),
    case("surgery_adamw_", steps=[torch.zeros(1)]),
    case("surgery_adamw_", part="sums"),
    *(case("surgery_adamw_", surgery_eps=value) for value in (0.0, NAN)),
    *(case("surgery_adamw_", alignment=value) for value in (NAN, INF)),
]


@pytest.fixture(params=["fast", "slow"])
def way(request, monkeypatch):
    """Past torch's dispatcher to the native functions, or through it to plain PyTorch."""
    take(request.param, monkeypatch)


def take(way, monkeypatch):
    if way == "fast" and (reason := backends.obstacle("cpu", "project_align", "cpu")):
        pytest.skip(reason)
    if way == "fast":
        monkeypatch.delenv(backends.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(backends.VARIABLE, "eager")
    monkeypatch.setattr(private_torch, "watched", lambda: way == "slow")


@pytest.mark.parametrize("operation, change", CASES)
def test_both_ways_refuse_alike(operation, change, monkeypatch):
    refused = []
    for which in ("fast", "slow"):
        take(which, monkeypatch)
        with pytest.raises((ValueError, TypeError)) as raised:
            call(operation, valid(operation) | change)
        refused.append((raised.type, str(raised.value)))
    assert refused[0] == refused[1]
    assert refused[0][1].startswith(f"{operation}: ")


@pytest.mark.parametrize("operation", backends.OPERATIONS)
def test_both_ways_serve_the_valid_ones(operation, way):
    call(operation, valid(operation))


@pytest.mark.parametrize("operation", ["project_align", "project_align_", "surgery_head"])
def test_numbers_of_numpy(operation, way):
    options = {"surgery_head": {"reference_batch_size": np.int64(3), "distillation": np.float32(0.5)}}
    call(operation, valid(operation) | {"eps": np.float32(1e-6)} | options.get(operation, {}))


def one_negated():
    z = torch.tensor([[1 - 2j]])
    return z.conj().imag


@pytest.mark.parametrize("where", ["fast", "slow"])
def test_negated_views_are_read_as_torch_reads_them(where, monkeypatch):
    """The imaginary part of a conjugate: torch changes the sign when it reads the number."""
    take(where, monkeypatch)
    x, h = one_negated(), torch.tensor([[1.0]])
    assert x.is_neg() and x.is_contiguous()
    got = {}
    for name, number in (("view", one_negated), ("copy", lambda: one_negated().clone())):
        grads, step, param = number(), number()[0, 0].detach(), number()
        sums = project_align_([grads], [number()], [number()], alignment=number()[0, 0], eps=0.5)
        heads = [number(), number()[0]] * 3
        head = dgs_kernels.surgery_head(number(), number(), number(), number()[0] - 1, *heads)
        state = [number(), number() ** 2]
        surgery_adamw_.run(
            *([param], [number()], state[:1], state[1:], [step], [number()], [number()], [0]),
            *(torch.zeros(1, 6), None, 0.3, 0.5, "align_first", "full", "all"),
            *(0.1, 0.9, 0.99, 0.0, 1e-8, False),
        )
        combined = [torch.empty(1, 1)]
        dgs_kernels.combine_(combined, [[number()], [number()]], torch.stack([number()[0, 0], h[0, 0]]))
        got[name] = (
            *(combined[0], dgs_kernels.gramian([[number()], [h]])),
            dgs_kernels.project_align(number(), h, number(), alignment=number()[0, 0], eps=0.5),
            dgs_kernels.project_align(h, number(), None, eps=0.5, rule="full"),
            *(grads, sums, param, step, *state, *head[:4]),
        )
    for view, copy in zip(got["view"], got["copy"]):
        torch.testing.assert_close(view, copy, rtol=1e-6, atol=1e-6)
    images = torch.rand(1, 3, 32, 32)
    negated = torch._neg_view(-images)
    torch.testing.assert_close(dgs_kernels.spectral_entropy(negated), dgs_kernels.spectral_entropy(images))


@pytest.mark.parametrize("where", ["fast", "slow"])
@pytest.mark.parametrize(
    "overlapping",
    [
        lambda x: [x[:4], x[2:6]],
        lambda x: [x, x],
        lambda x: [x[:2].expand(3, 2)],
        lambda x: [x.view(2, 4)[:, :3], x.view(2, 4)[:, 2:]],
    ],
)
def test_overlapping_gradients_are_refused(overlapping, where, monkeypatch):
    take(where, monkeypatch)
    grads = overlapping(torch.ones(8))
    with pytest.raises(ValueError, match="share memory"):
        project_align_(grads, [torch.ones_like(g) for g in grads])


@pytest.mark.parametrize(
    "count, names",
    [
        (3, r"grads\[0\] and grads\[1\] and grads\[2\]"),
        (144, r"grads\[0\] and grads\[1\] and 142 more"),
    ],
)
def test_of_many_overlapping_gradients_a_few_are_named(count, names):
    x = torch.ones(4)
    with pytest.raises(ValueError, match=f"numbers of {names} share memory"):
        project_align_([x] * count, [x] * count)


def test_neighbours_in_one_memory_are_no_overlap(way):
    memory = torch.arange(12.0).reshape(3, 4)
    grads = [memory[:, :2], memory[:, 2:]]
    apart = [g.clone() for g in grads]
    harmful = [torch.ones(3, 2), torch.ones(3, 2)]
    project_align_(apart, harmful)
    project_align_(grads, harmful)
    assert all(map(torch.equal, grads, apart))


def test_parameters_are_no_gradients(way):
    with pytest.raises(ValueError, match="must not require grad"):
        project_align_([nn.Parameter(torch.ones(2))], [torch.ones(2)])


@pytest.mark.parametrize(
    "dim, error", [(0, ValueError), (-1, ValueError), (2.5, TypeError), (None, TypeError)]
)
def test_surgery_head_needs_a_width(dim, error):
    with pytest.raises(error, match="SurgeryHead: dim must be"):
        SurgeryHead(dim)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_labels_that_are_none_become_nan_where_nothing_can_be_raised(backend):
    """What a GPU does, which is not waited for."""
    if reason := backends.obstacle(backend, "surgery_head", "cpu"):
        pytest.skip(reason)
    features, teacher, text, _, *weights = valid("surgery_head").values()
    pairs = [w for which in zip(weights[:3], weights[3:]) for w in which]
    serve = backends._load(backend, "surgery_head")
    results = [torch.zeros(shape) for shape in ((4,), (3, 3), (3, 3), (2, 5), (0, 4))]
    labels = torch.tensor([0.0, 1.0, 1.5])
    options = (1e-6, "align_first", None, "project", None, 0.0)
    serve(features, teacher, text, labels, *pairs, *options, *results)
    assert results[0][:3].isnan().all()


@pytest.mark.parametrize("change", [{n: v} for n, vs in NO_OPTION.items() for v in vs], ids=str)
def test_hooks_refuse_options_when_they_are_made(change):
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises((ValueError, TypeError), match=r"^OptimizerSurgery: "):
        OptimizerSurgery(torch.optim.SGD([parameter]), **change)
    change = {"surgery_eps" if name == "eps" else name: value for name, value in change.items()}
    with pytest.raises((ValueError, TypeError), match=r"^SurgeryAdamW: "):
        SurgeryAdamW([parameter], **change)


@pytest.mark.parametrize("name", ["model", "scaler", "process_group"])
@pytest.mark.parametrize("hook", [OptimizerSurgery, SurgeryAdamW, ObjectiveSurgery])
def test_hooks_refuse_objects_of_other_classes(hook, name):
    parameters = [nn.Parameter(torch.zeros(2))]
    given = parameters if hook is SurgeryAdamW else torch.optim.SGD(parameters)
    expected = {"model": "nn.*Module", "scaler": "GradScaler", "process_group": "ProcessGroup"}[name]
    with pytest.raises(TypeError, match=rf"^{hook.__name__}: {name} must be .*{expected} or None, got str"):
        hook(given, **{name: "x"})


@pytest.mark.parametrize("hook", [OptimizerSurgery, ObjectiveSurgery])
def test_hooks_need_an_optimizer(hook):
    with pytest.raises(
        TypeError, match=f"^{hook.__name__}: optimizer must be a torch.optim.Optimizer, got list"
    ):
        hook([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("make", [lambda p, **o: OptimizerSurgery(torch.optim.SGD([p]), **o), SurgeryAdamW])
def test_unknown_options_name_the_class_that_was_called(make):
    name = "SurgeryAdamW" if make is SurgeryAdamW else "OptimizerSurgery"
    with pytest.raises(
        TypeError, match=rf"{name}\.__init__\(\) got an unexpected keyword argument 'strength'"
    ):
        parameter = nn.Parameter(torch.zeros(2))
        make([parameter] if make is SurgeryAdamW else parameter, strength=1)


@pytest.mark.parametrize(
    "change", [{"features": None}, {"harmful": [1.0]}, {"eps": "x"}, {"order": 1}], ids=str
)
def test_gradient_surgery_says_what_it_expects(change):
    with pytest.raises((ValueError, TypeError), match=r"^gradient_surgery: "):
        gradient_surgery(**({"features": rows(), "harmful": rows()} | change))


def forward_modes():
    """Both ways of asking for a forward derivative in direction 1, of a function of one tensor."""

    def dual(function, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    yield dual
    yield lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("derivative", list(forward_modes()))
def test_forward_mode(derivative):
    x, h, b = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = derivative(lambda x: dgs_kernels.project_align(x, h, b), x)
    torch.testing.assert_close(got, dgs_kernels.project_align(torch.ones_like(x), h))
    head = valid("surgery_head")
    for function in (
        lambda x: gradient_surgery(x, h, b)[0],
        lambda x: project_align_([x], [h]),
        lambda x: project_align_([h.float()], [x]),
        lambda x: dgs_kernels.surgery_head(**(head | {"features": x})).image_loss,
        lambda x: dgs_kernels.gramian([[h], [x]]),
        lambda x: dgs_kernels.combine_([h.float()], [[h.float()], [x]], torch.ones(2)),
        lambda x: dgs_kernels.spectral_entropy(x.expand(1, 3, 3, 4), 2),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            derivative(function, x.float())


@pytest.mark.parametrize("operation", ["project_align_", "combine_", "surgery_adamw_"])
def test_traces_that_would_leave_an_operation_out(operation):
    def function(x):
        return call(operation, valid(operation)) or x

    with pytest.raises(NotImplementedError, match=rf"{operation}: torch\.jit\.trace leaves out"):
        torch.jit.trace(function, (rows(),), check_trace=False)


def test_an_in_place_layer_may_follow_the_hook():
    """As ReLU(inplace=True) in torchvision's models, and the producer's own output stays as it was."""
    x, harmful, beneficial = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    grads = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        # The derivative of exp is its own result.
        produced = leaf.exp() - 1
        seen, alignment_loss = gradient_surgery(produced, harmful, beneficial)
        kept = produced.detach().clone()
        (nn.ReLU(inplace=inplace)(seen).square().sum() + 0.2 * alignment_loss).backward()
        assert torch.equal(produced, kept)
        grads.append(leaf.grad)
    assert torch.equal(*grads)
