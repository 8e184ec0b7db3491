"""Every hook on two processes, against the same computation done plainly in one."""

from __future__ import annotations

import pytest
import torch

from dgs_kernels import reference
from tests.dgs_kernels.hooks.table import check, is_refused, works
from tests.dgs_kernels.hooks.tracked_on_ranks import kept, subspace, tracked
from tests.dgs_kernels.hooks.training_loops import (
    STEPS,
    Hook,
    Net,
    assert_same,
    batch,
    every_product,
    hooks,
    on_parameters,
    plain,
    weights,
)
from tests.dgs_kernels.hooks.two_ranks import on_two_ranks
from tests.support.fresh import FORKSERVER


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
        ("by_hand", ["reduced_by_hand"]),
        ("ddp_one_forward", ["ddp_two_backwards_remedy", "process_group_of_one"]),
        ("fsdp2", ["fsdp2", "fsdp2_layer", "fsdp2_model", "fsdp2_in_part", "fsdp2_layer_in_part"]),
        ("trainer_fsdp2", ["trainer_fsdp2"]),
    ],
)
def test_two_ranks(two_ranks, kind, loop, scenarios):
    layers = {name: [0] * 7 for name in ("fsdp2_model", "fsdp2_in_part")}
    layers |= {name: [0, 0, 1, 2, 2, 3, 3] for name in ("fsdp2_layer", "fsdp2_layer_in_part")}
    for scenario in scenarios:
        assert_same(two_ranks[scenario, kind], plain(kind, layers=layers.get(scenario, range(7))))
    works(loop, kind)


@on_parameters
@pytest.mark.parametrize("scenario", ["tracked_ddp", "tracked_fsdp2"])
def test_updates_are_measured_over_all_ranks(two_ranks, kind, scenario):
    model = Net()
    hook = Hook(kind, model, model=model, granularity="layer", track_update=True)
    torch.testing.assert_close(two_ranks[scenario, kind], tracked(hook, model))


@on_parameters
@pytest.mark.parametrize("scenario", ["kept_fsdp2", "kept_process_group"])
def test_kept_gradients_on_two_ranks(two_ranks, kind, scenario):
    model = Net()
    hook = Hook(kind, model, model=model, granularity="layer")
    torch.testing.assert_close(two_ranks[scenario, kind], kept(hook, model))


@pytest.mark.parametrize("scenario", ["fsdp2", "ddp", "process_group"])
def test_subspaces_on_two_ranks(two_ranks, scenario):
    model = Net()
    torch.testing.assert_close(two_ranks[f"subspace_{scenario}", "subspace"], subspace(model, model))


@pytest.mark.parametrize("way", ["checkpoint", "each its own", "whole"])
def test_a_sharded_subspace_resumes_to_the_same_bits(two_ranks, way):
    went_on = two_ranks["subspace_resumed: never", "subspace"]
    assert all(map(torch.equal, two_ranks[f"subspace_resumed: {way}", "subspace"], went_on))


def test_a_sharded_subspace_resumes_in_one_process(two_ranks):
    went_on = two_ranks["subspace_resumed: never", "subspace"]
    torch.testing.assert_close(two_ranks["subspace_resumed: in one process", "subspace"], went_on)


def test_references_that_differ_between_ranks_are_refused(two_ranks):
    assert "the captured gradients differ between ranks" in two_ranks["subspace_unreduced", "subspace"]


@hooks
@pytest.mark.parametrize("scenario", ["ranks_that_do_not_train_together", "ddp_over_some_ranks"])
def test_ranks_that_do_not_train_together(two_ranks, scenario, kind):
    assert_same(two_ranks[scenario, kind], plain(kind))


def test_stages_are_told_from_gradients_that_differ(two_ranks):
    message = two_ranks["captured_stages", "objectives"]
    assert (
        "different parameters" in message
        and "pass process_group=, the ranks that hold the same stage" in message
    )


@on_parameters
@pytest.mark.parametrize(
    "loop, scenarios, remedy",
    [
        ("ddp_two_backwards", ["ddp_two_backwards"], "pass process_group="),
        ("ddp_captures", ["ddp_captures_without_the_wrapper"], "pass process_group="),
        ("by_hand_captures", ["task_reduced_by_hand"], "pass process_group="),
        (
            "fsdp2_no_sync",
            ["fsdp2_no_sync", "fsdp2_task_unreduced"],
            "do not call set_requires_gradient_sync(False)",
        ),
        ("trainer_fsdp2_no_sync", ["trainer_fsdp2_no_sync"], "sync_each_batch=True"),
        ("fsdp2_scaler", ["fsdp2_scaler"], "train in bfloat16"),
        ("fsdp2_without_model", ["fsdp2_without_model"], "need model="),
    ],
)
def test_two_ranks_refused(two_ranks, kind, loop, scenarios, remedy):
    for scenario in scenarios:
        is_refused(loop, kind, two_ranks[scenario, kind], remedy)


@pytest.mark.parametrize("scenario", ["ddp", "zero", "without_the_wrapper", "scaler_fsdp2", "on_one_rank"])
def test_every_loss_captured_on_two_ranks(two_ranks, scenario):
    assert_same(two_ranks[f"captured_{scenario}", "objectives"], plain("objectives"))


@pytest.mark.parametrize(
    "scenario, granularity",
    [
        ("captured_running_ddp", "model"),
        ("captured_running_without_the_wrapper", "model"),
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
    rows = every_product(reference.gramian(objectives, [0] * 4)[0])
    for p, grad in zip(params, reference.combine_(objectives[0], objectives, rows, [0] * 4)):
        p.grad = grad
    torch.optim.AdamW(params, lr=0.5, eps=0.5).step()
    *reached, weight, bias = two_ranks["captured_on_some_ranks", "objectives"]
    torch.testing.assert_close(reached, weights(net))
    assert (weight == 0.5).all() and (bias == 0.5).all()


@pytest.mark.parametrize("loop", ["fsdp2_no_sync", "fsdp2_scaler", "trainer_fsdp2_no_sync"])
def test_features_do_not_care_how_gradients_are_reduced(two_ranks, loop):
    assert_same(two_ranks[loop, "features"], plain("features"))
    works(loop, "features")


def test_the_documented_table_is_what_these_tests_found():
    check(__file__)
