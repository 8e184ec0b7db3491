"""A-GEM (arXiv 1812.00420): learn tasks in turn, never moving against the gradient of a memory of old ones.

That is `rule="conflict"` over the whole model: where <task, memory> < 0, that part of the step is removed.
"""

import torch
from torch import nn

from dgs_kernels import SurgeryAdamW

TASKS, MEMORY = 3, 64


def task_data(task, n):
    """Task k: the class is the sign of one random direction, among inputs around a random centre."""
    generator = torch.Generator().manual_seed(task)
    centre, direction = 3 * torch.randn(2, 16, generator=generator)
    x = torch.randn(n, 16) + centre
    return x, ((x - centre) @ direction > 0).float()[:, None]


def train(remember):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1))
    optimizer = SurgeryAdamW(model.parameters(), lr=3e-3, rule="conflict", granularity="model")
    loss_function = nn.BCEWithLogitsLoss()
    memory = []
    for task in range(TASKS):
        for _ in range(150):
            if memory and remember:
                x, y = (torch.cat(part) for part in zip(*memory))
                with optimizer.harmful():
                    loss_function(model(x), y).backward()
            x, y = task_data(task, 64)
            loss_function(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        memory.append(task_data(task, MEMORY))
    tests = [task_data(task, 1000) for task in range(TASKS)]
    return [((model(x) > 0) == (y > 0)).float().mean().item() for x, y in tests]


plain, remembered = train(remember=False), train(remember=True)
for name, accuracies in (("plain", plain), ("A-GEM", remembered)):
    print(f"{name:6s}", "  ".join(f"task {i}: {a:.1%}" for i, a in enumerate(accuracies)))
print(f"mean accuracy {sum(plain) / TASKS:.1%} -> {sum(remembered) / TASKS:.1%}")
