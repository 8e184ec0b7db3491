"""GEM (arXiv 1706.08840): digits in a new order of pixels for each task, a memory of every task before.

Each step follows the new task's gradient as closely as it can without raising the loss on any memory.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from dgs_kernels import ObjectiveSurgery

TASKS, MEMORY = 4, 128
images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float() / 16
orders = [torch.randperm(64, generator=torch.Generator().manual_seed(task)) for task in range(TASKS)]


def draw(task, n, first=0, last=1200):
    rows = torch.randint(first, last, (n,))
    return images[rows][:, orders[task]], labels[rows]


def train(remember):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    surgery = ObjectiveSurgery(optimizer, weighting="gem")
    memories = []
    for task in range(TASKS):
        for _ in range(100):
            x, y = draw(task, 64)
            # The gradient in `.grad` is the first objective.
            nn.functional.cross_entropy(model(x), y).backward()
            for old_x, old_y in memories:
                with surgery.objective():
                    nn.functional.cross_entropy(model(old_x), old_y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if remember:
            memories.append(draw(task, MEMORY))
    tests = (draw(task, 2000, 1200, len(images)) for task in range(TASKS))
    return [(model(x).argmax(1) == y).float().mean().item() for x, y in tests]


plain, remembered = train(remember=False), train(remember=True)
for name, accuracies in (("plain", plain), ("GEM", remembered)):
    print(f"{name:6s}", "  ".join(f"task {i}: {a:.1%}" for i, a in enumerate(accuracies)))
print(f"mean accuracy {sum(plain) / TASKS:.1%} -> {sum(remembered) / TASKS:.1%}")
