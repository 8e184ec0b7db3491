"""Pretrain the tiny CLIP that ships with the package, on captioned crops of the training photographs.

    python -m dgsnet.builtin.pretrain --out runs/pretrain --seed 0 --steps 4000

It learns, contrastively, what photographs show and how good they are (blur, noise, compression); it never
sees a decoder's output, nor a photograph of the validation or test split. Every batch is a function of seed
and step, so a run that was stopped continues from its last saved state as if it had not been.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dgsnet.builtin.crops import BLUR, JPEG, NOISE, Quality, degrade, describe, sample_crop
from dgsnet.builtin.photographs import PHOTOGRAPHS, Photograph
from dgsnet.files import replacing, write_file

MODEL_CONFIG = Path(__file__).with_name("dgsnet-tiny.json")
# JPEG's grid is anywhere in the input, as in the images of the dataset.
CROP, INPUT = 48, 32
# Steps of warm-up, and the last fraction of the steps, in which the learning rate falls to zero.
WARMUP, DECAY = 200, 0.25
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


class CaptionedCrops(Dataset):
    """Item `step` is that step's batch.

    Pixels float32 [n, 3, 32, 32] normalised as CLIP's, tokens int64 [n, 77], and the words of each crop
    for content, blur, noise and compression.
    """

    def __init__(self, photographs: tuple[Photograph, ...], batch_size: int, seed: int, steps: int) -> None:
        self.photographs, self.batch_size, self.seed, self.steps = photographs, batch_size, seed, steps
        self.tokenize = open_clip.SimpleTokenizer(context_length=77)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, ...]]]:
        rng = np.random.default_rng([self.seed, step])
        pixels, captions, words = [], [], []
        for _ in range(self.batch_size):
            photograph = self.photographs[rng.integers(len(self.photographs))]
            crop, content = sample_crop(photograph, CROP, rng)
            quality = Quality.draw(rng)
            top, left = rng.integers(CROP - INPUT + 1, size=2)
            pixels.append(degrade(crop, quality, rng)[top : top + INPUT, left : left + INPUT])
            captions.append(describe(content, quality.words))
            words.append((content, *quality.words))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        return (images - MEAN) / STD, self.tokenize(captions), words


def new_model() -> open_clip.CLIP:
    """The tiny CLIP with random weights, as dgsnet-tiny.json describes it."""
    return open_clip.CLIP(**json.loads(MODEL_CONFIG.read_text()))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, linear decay over the last quarter; until then `steps` may still change."""
    remaining = (steps - step) / (DECAY * steps)
    return peak * min((step + 1) / WARMUP, 1.0, remaining)


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, seed: int, crops: int = 1024) -> dict[str, float]:
    """Accuracy of the nearest caption, factor by factor, among all contents and qualities.

    Fresh crops of the training photographs, whose content it should know; and crops of the validation
    photographs, never seen, of which only the quality can be told.
    """
    was_training = model.training
    model.eval()
    contents = sorted(
        {c for p in PHOTOGRAPHS["train"] for c in (p.content, *(region[4] for region in p.regions))}
    )
    candidates = list(itertools.product(contents, *([word for word, _, _ in t] for t in (BLUR, NOISE, JPEG))))
    tokens = open_clip.SimpleTokenizer(context_length=77)(
        [describe(content, words) for content, *words in candidates]
    )
    text = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])
    accuracy = {}
    names = ("content", "blur", "noise", "jpeg")
    for split, factors in (("train", names), ("val", names[1:])):
        images, _, words = CaptionedCrops(PHOTOGRAPHS[split], crops, seed, 2**31)[2**31 - 1]
        features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(256)])
        found = [candidates[i] for i in (features @ text.T).argmax(dim=1)]
        for factor in factors:
            k = names.index(factor)
            accuracy[f"{split}_{factor}"] = float(np.mean([f[k] == w[k] for f, w in zip(found, words)]))
    model.train(was_training)
    return accuracy


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 4000,
    batch_size: int = 128,
    lr: float = 1e-3,
    save_every: int = 200,
) -> Path:
    """Train for `steps` steps, or continue the run in `out`; returns the path of the fp16 weights.

    Writes out/dgsnet-tiny.safetensors (fp16, open_clip's names), out/dgsnet-tiny.training.json (what made it)
    and out/state.pt (to continue). The result depends on seed, steps, batch size and learning rate only, up
    to the rounding of the machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = new_model()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    first, seconds, loss = 0, 0.0, None
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, loss = state["step"], state["seconds"], state["loss"]
    batches = CaptionedCrops(PHOTOGRAPHS["train"], batch_size, seed, steps)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(first, steps), num_workers=1, prefetch_factor=4
    )
    clip_loss = ClipLoss()
    began = time.monotonic() - seconds
    for step, (images, tokens, _) in zip(range(first, steps), tqdm(loader, mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        batch_loss = clip_loss(image, text, model.logit_scale.exp())
        optimizer.zero_grad()
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        loss = batch_loss.item() if loss is None else 0.98 * loss + 0.02 * batch_loss.item()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(out, model, optimizer, dict(step=step + 1, loss=loss, seconds=time.monotonic() - began))
            tqdm.write(f"step {step + 1}: loss {loss:.3f}")
    record = dict(
        command=f"python -m dgsnet.builtin.pretrain --out {out} "
        f"--seed {seed} --steps {steps} --batch-size {batch_size} --lr {lr}",
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        parameters=sum(p.numel() for p in model.parameters()),
        final_loss=loss,
        zero_shot_accuracy=zero_shot(model, seed),
        seconds=round(time.monotonic() - began),
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, open_clip=open_clip.__version__
        ),
    )
    (out / "dgsnet-tiny.training.json").write_text(json.dumps(record, indent=2) + "\n")
    return out / "dgsnet-tiny.safetensors"


def _save(
    out: Path, model: open_clip.CLIP, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    write_file(out / "dgsnet-tiny.safetensors", save(half))
    with replacing(out / "state.pt", "wb") as file:
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), **progress), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; one that exists is continued"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    print(pretrain(**vars(arguments)))


if __name__ == "__main__":
    main()
