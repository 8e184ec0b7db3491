"""What optimisers make of an edited gradient: cosines of the update with the captured one, kept promises.

A model that knows scikit-learn's digits 0 to 4 learns 5 to 9; the gradient on a batch of the old digits is
captured beside each step. Three models: an MLP, a transformer that reads the rows of an image as eight
tokens, and LoRA adapters on that transformer. Each step of torch.optim's SGD, SGD with momentum, AdamW and
Muon (of the matrices; what is no matrix rests) is measured with `track_update=True`: without surgery, with
rule "full" and with rule "conflict". Then the cost: processor time of a step of 13 M numbers, tracked or not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.update import cells
from dgs_kernels import ObjectiveSurgery, OptimizerSurgery, SurgeryAdamW

NAME, COST = "update_promise", "update_promise_cost"
SEEDS, STEPS, OLD_STEPS, BATCH = range(5), 40, 80, 64
WIDTH, RANK = 32, 4
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.02),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.005, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=2e-3),
    "Muon": lambda params: torch.optim.Muon(params, lr=0.01),
}
SURGERIES = ("none", "full", "conflict")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, WIDTH), nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels.view(-1, 8, 8)) + self.places
        for i in range(2):
            heads = self.qkv[i](self.norms[2 * i](x)).view(-1, 8, 3, 4, WIDTH // 4)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            x = x + self.out[i](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))


class LoRA(nn.Module):
    """Added to a frozen weight: a product of rank RANK."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.b @ self.a


def with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", LoRA(linear.weight))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "MLP": (mlp, lambda model: model),
    "transformer": (Transformer, lambda model: model),
    "transformer, LoRA": (Transformer, with_adapters),
}


def batches(old: bool, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    pixels, labels = load_digits(return_X_y=True)
    mine = (labels < 5) == old
    x, y = torch.tensor(pixels[mine], dtype=torch.float32) / 16, torch.tensor(labels[mine])
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(y), (BATCH,), generator=draw)
        yield x[rows], y[rows]


def run(model_name: str, optimizer_name: str, surgery_name: str, seed: int) -> dict:
    """The metrics of STEPS steps that learn the new digits."""
    torch.manual_seed(seed)
    make, adapt = MODELS[model_name]
    model = make()
    learn = torch.optim.AdamW(model.parameters(), lr=3e-3)
    old, new = batches(True, 2 * seed), batches(False, 2 * seed + 1)
    for _ in range(OLD_STEPS):
        x, y = next(old)
        F.cross_entropy(model(x), y).backward()
        learn.step()
        learn.zero_grad()
    model = adapt(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[optimizer_name](
        [(n, p) for n, p in named if optimizer_name != "Muon" or p.ndim == 2]
    )
    cosines = []
    if surgery_name == "none":
        objectives = ObjectiveSurgery(
            optimizer, lambda gramian: gramian.new_tensor([1.0, 0.0]), "layer", track_update=True
        )
        contexts = objectives.objective, objectives.objective
        surgery: ObjectiveSurgery | OptimizerSurgery = objectives
    else:
        references = OptimizerSurgery(optimizer, rule=surgery_name, granularity="layer", track_update=True)
        contexts, surgery = (None, references.harmful), references
    for _ in range(STEPS):
        for context, (x, y) in zip(contexts, (next(new), next(old))):
            loss = F.cross_entropy(model(x), y)
            if context is None:
                loss.backward()
                continue
            with context():
                loss.backward()
        optimizer.step()
        model.zero_grad()
        metrics = surgery.metrics()
        cosines.append(metrics.update_cosine[:, 1 if surgery_name == "none" else 0])
    found = torch.stack(cosines)
    return {
        "median": float(found.abs().median()),
        "p90": float(found.abs().quantile(0.9)),
        "falls": float((found <= 0.01).float().mean()),
        "held": float(metrics.promise_held.mean()),
    }


def costs() -> Iterator[dict]:
    """Processor seconds of a step, medians, hook by hook."""
    for name in ("SurgeryAdamW", "OptimizerSurgery"):
        for tracked in (False, True):
            params = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(13)]
            grads = [[torch.randn_like(p) for p in params] for _ in range(2)]
            if name == "SurgeryAdamW":
                optimizer: torch.optim.Optimizer = SurgeryAdamW(params, rule="full", track_update=tracked)
                surgery = optimizer
            else:
                optimizer = torch.optim.AdamW(params, foreach=True)
                surgery = OptimizerSurgery(optimizer, rule="full", track_update=tracked)
            seconds = []
            for _ in range(12):
                with surgery.harmful():
                    for p, g in zip(params, grads[0]):
                        p.grad = g.clone()
                for p, g in zip(params, grads[1]):
                    p.grad = g.clone()
                before = time.process_time()
                optimizer.step()
                seconds.append(time.process_time() - before)
            yield {
                "benchmark": COST,
                "device": "cpu",
                "hook": name,
                "tracked": tracked,
                "seconds": statistics.median(seconds[2:]),
            }


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    torch.set_num_threads(1)
    found = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            for surgery in SURGERIES:
                for seed in SEEDS:
                    case = {"benchmark": NAME, "device": "cpu", "model": model, "optimizer": optimizer}
                    row = case | {"surgery": surgery, "seed": seed} | run(model, optimizer, surgery, seed)
                    found.append(row)
                    yield row
    print(table(found), flush=True)
    for row in costs():
        print(f"{row['hook']}, {'tracked' if row['tracked'] else 'plain'}: {1e3 * row['seconds']:.1f} ms")
        yield row


def table(rows: list[dict]) -> str:
    """Markdown, in percent, means over seeds with standard errors."""
    head = [
        "model",
        "optimiser",
        "median, 90th percentile of abs(cos), no surgery",
        "`full`",
        "`full` kept",
        "does not rise, no surgery",
        "`conflict`",
    ]
    lines = [head, ["---"] * len(head)]
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            mine = {
                s: [r for r in rows if (r["model"], r["optimizer"], r["surgery"]) == (model, optimizer, s)]
                for s in SURGERIES
            }
            sizes = [np.array([[r["median"], r["p90"]] for r in mine[s]]) for s in ("none", "full")]
            shares = [
                cells(np.array([[r[key]] for r in mine[s]]), "")[0]
                for s, key in (("full", "held"), ("none", "falls"), ("conflict", "falls"))
            ]
            lines.append(
                [model, optimizer, *(", ".join(f"{v:.2f}" for v in s.mean(0)) for s in sizes), *shares]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
