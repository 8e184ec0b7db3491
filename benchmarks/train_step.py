"""`python -m benchmarks train_step`: a whole training step, the official algorithm's and ours side by side.

Every variant lives in a process of its own and steps when it is told to, so that all take turns, and its peak
memory is its own. Weights are random, images are PNG files cut from photographs, captions have twelve tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from dgsnet.builtin.crops import sample_crop
from dgsnet.builtin.photographs import PHOTOGRAPHS
from dgsnet.config import ModelConfig, OptimConfig, PreprocessConfig, SurgeryConfig
from dgsnet.data.images import file_hash, read_image
from dgsnet.data.items import Item
from dgsnet.data.loading import ImageDataset
from dgsnet.data.preprocess import NORMALIZATIONS, Preprocessor
from dgsnet.model import adapters, pretrained
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.frozen import CaptionFeatures, ImageFeatures
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import Step, layer_surgery, named_parameters, speed_up
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop

from benchmarks import harness
from dgs_kernels import reference

PARTS = ("data", "text", "teacher", "student", "surgery", "backward", "optimiser")
PUBLISHED, PUBLISHED_BF16, PLAIN, OURS, STORED = (
    "official as published",
    "official, bf16 autocast",
    "ours, no surgery",
    "ours",
    "ours, data.views",
)
WORDS = ("a", "photo", "of", "the", "red", "old", "dog", "cat", "car", "tree", "house", "on", "street", "sky")
TOKENS = 12
RANK, ALPHA, DROPOUT, ALIGNMENT, LEARNING_RATE = 6, 6.0, 0.8, 0.2, 1e-4
MIN_ROUNDS = 5


@dataclass
class Settings:
    """What all variants share; `image` is the side of the PNG files."""

    model: str
    batch: int
    device: str
    threads: int
    image: int
    folder: str
    workers: int


@dataclass
class Variant:
    """One of the rows of the table: the name of a class below, what it is made with, and the one of ABLATIONS
    that is undone."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    without: str = ""


class Clock:
    """Sums the seconds of parts, waiting for the device at their ends."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = now(self.device)
        yield
        self.seconds[part] += now(self.device) - start


class FlopCounter(TorchDispatchMode):
    """Adds up torch's own counts; its FlopCounterMode does not go together with `autograd.grad`."""

    flop = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        # It is not in torch's registry.
        if op is torch.ops.aten.addmm_.default:
            self.flop += mm_flop(args[1].shape, args[2].shape)
        elif count := flop_registry.get(op.overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


@contextlib.contextmanager
def no_clock(part: str) -> Iterator[None]:
    yield


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -- the official algorithm ------------------------------------------------------------------------------


class DenseLoRAAttention(nn.Module):
    """Self-attention with LoRA the way it was published: dropout(x) times the dense product B A."""

    def __init__(self, fused: nn.MultiheadAttention, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.num_heads, self.out_proj, self.dropout = fused.num_heads, fused.out_proj, dropout
        width = fused.embed_dim
        self.weights = nn.ParameterList(w.detach().clone() for w in fused.in_proj_weight.chunk(3))
        self.biases = nn.ParameterList(b.detach().clone() for b in fused.in_proj_bias.chunk(3))
        self.requires_grad_(False)
        self.lora_a = nn.ParameterList(torch.empty(RANK, width) for _ in "qkv")
        self.lora_b = nn.ParameterList(torch.zeros(width, RANK) for _ in "qkv")
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        q, k, v = (
            self._project(x, *tensors).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, *tensors in zip((query, key, value), self.weights, self.biases, self.lora_a, self.lora_b)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        update = F.dropout(x, self.dropout, self.training) @ (b @ a).T
        return F.linear(x, weight, bias) + update * (ALPHA / math.sqrt(RANK))


class Official:
    """Two CLIPs, 77 tokens in every step, dense LoRA, `autograd.grad` twice, a hook, Adam, NumPy mosaics."""

    def __init__(self, settings: Settings, bf16: bool = False, dropout: float = DROPOUT) -> None:
        self.settings, device = settings, settings.device
        # This registers the built-in model.
        pretrained._model_config(settings.model)
        self.tokenizer = open_clip.get_tokenizer(settings.model)
        self.clip = open_clip.create_model(settings.model).requires_grad_(False)
        self.frozen = copy.deepcopy(self.clip).to(device).train()
        for block in self.clip.visual.transformer.resblocks:
            block.attn = DenseLoRAAttention(block.attn, dropout)
        # [L, N, D] inside, as the original CLIP has it: several times as fast in nn.MultiheadAttention.
        for transformer in (self.frozen.visual.transformer, self.clip.transformer):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False
        self.clip.to(device).train()
        dim = self.clip.visual.output_dim
        self.heads = nn.ModuleDict({name: nn.Linear(dim, 1) for name in ("image", "teacher", "text")})
        self.heads.to(device)["teacher"].requires_grad_(False)
        trained = [p for module in (self.clip, self.heads) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=bf16)
        self.rng = np.random.default_rng(0)

    def load(self, paths: list[str]) -> Tensor:
        size = self.clip.visual.image_size[0]
        images = [numpy_mosaic(np.asarray(Image.open(p).convert("RGB")), size, self.rng) for p in paths]
        return torch.from_numpy(np.stack(images))

    def step(self, paths: list[str], captions: list[str], labels: Tensor, clock=no_clock) -> None:
        with clock("data"):
            pixels = self.load(paths).to(self.settings.device)
        with self.autocast():
            with clock("student"):
                features = self.clip.encode_image(pixels)
            with clock("teacher"), torch.no_grad():
                teacher = self.frozen.encode_image(pixels)
            with clock("text"), torch.no_grad():
                text = self.clip.encode_text(self.tokenizer(captions).to(self.settings.device))
        # Cut at the features, so that the surgery has a time of its own; the arithmetic is that of one graph.
        with clock("surgery"):
            leaf = features.detach().requires_grad_()
            with self.autocast():
                loss = self.loss(leaf, teacher, text, labels)
            self.optimizer.zero_grad()
            loss.backward()
        with clock("backward"):
            features.backward(leaf.grad)
        with clock("optimiser"):
            self.optimizer.step()

    def loss(self, features: Tensor, teacher: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """The sum of the three losses; the surgery hangs on `features` as a hook."""
        teacher, text = teacher.detach().requires_grad_(), text.detach().requires_grad_()
        image_loss, teacher_loss, text_loss = (
            F.binary_cross_entropy_with_logits(self.heads[name](x).squeeze(1), labels)
            for name, x in (("image", features), ("teacher", teacher), ("text", text))
        )
        (g_text,) = torch.autograd.grad(text_loss, text, retain_graph=True)
        (g_teacher,) = torch.autograd.grad(teacher_loss, teacher, retain_graph=True)
        harmful = g_text.relu()
        direction = harmful / (harmful.norm(dim=1, keepdim=True) + 1e-6)
        features.register_hook(lambda g: g - (g * direction).sum(1, keepdim=True) * direction)
        alignment = (features * g_teacher.clamp(max=0)).sum(1).mean()
        return image_loss + text_loss + ALIGNMENT * alignment


def numpy_mosaic(image: np.ndarray, size: int, rng: np.random.Generator, patch: int = 32) -> np.ndarray:
    """The patch-selection mosaic, float32 [3, size, size], one patch after the other."""
    side = size // patch
    entropies, patches = [], []
    for y in range(0, image.shape[0] - patch + 1, patch):
        for x in range(0, image.shape[1] - patch + 1, patch):
            piece = image[y : y + patch, x : x + patch]
            luma = piece.astype(np.float32) @ np.array(reference.LUMA, np.float32) / np.float32(255)
            energy = np.abs(np.fft.fft2(luma)) ** 2
            share = energy / (energy.sum() + reference.ENTROPY_EPS)
            entropies.append(-(share * np.log2(share + reference.ENTROPY_EPS)).sum())
            patches.append(piece)
    order, half = np.argsort(entropies), side * side // 2
    chosen = rng.permutation(np.concatenate([order[:half], order[half - side * side :]]))
    rows = [np.concatenate([patches[i] for i in chosen[r * side : (r + 1) * side]], 1) for r in range(side)]
    mosaic = np.concatenate(rows)
    if rng.random() < 0.5:
        mosaic = mosaic[:, ::-1]
    mean, std = (np.array(v, np.float32) for v in NORMALIZATIONS["imagenet"])
    return ((mosaic.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


# -- ours ------------------------------------------------------------------------------------------------


class Ours:
    """dgsnet's own step, as `dgsnet train` runs it."""

    def __init__(
        self,
        settings: Settings,
        surgery: str = "feature",
        text_in_step: bool = False,
        fused: bool = True,
        autocast: bool = False,
        stored: bool = False,
        **optim: Any,
    ) -> None:
        self.settings, device = settings, settings.device
        optim = OptimConfig(**({"precision": "bf16"} | optim))
        self.model = DGSNet(ModelConfig(name=settings.model, pretrained="")).to(device)
        self.surgery = None if surgery == "none" else SurgeryConfig(mode=surgery)
        self.text = self.model.text_features
        if not text_in_step:
            captions = {caption for i in range(POOL) for caption in sentences(settings.batch, i)}
            self.text = CaptionFeatures(self.model, captions, settings.folder) if self.surgery else None
            self.model.text = None
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=autocast)
        speed_up(self.model, replace(optim, precision="fp32") if autocast else optim)
        self.module = Step(self.model, BRANCHES, self.surgery, captioned=self.surgery is not None)
        self.optimizer = torch.optim.AdamW(
            named_parameters(self.model), lr=LEARNING_RATE, weight_decay=0, fused=fused
        )
        self.layerwise = layer_surgery(self.optimizer, self.surgery) if surgery == "layer" else None
        size = self.model.image_size
        self.preprocess = Preprocessor(PreprocessConfig(image_size=size, num_patches=(size // 32) ** 2))
        self.rng = np.random.default_rng(0)
        self.frozen = self.stored_features() if stored else None

    def stored_features(self) -> Callable[[list[str]], Tensor]:
        """Looks up the frozen tower's features of image files, which are computed now."""
        paths = sorted(Path(self.settings.folder).glob("*.png"))
        samples = [Item(str(path), 0, "") for path in paths]
        images = ImageDataset(samples, self.preprocess, train=True, views=1)
        accelerator = Accelerator(cpu=self.settings.device == "cpu")
        features = ImageFeatures(self.model, images, accelerator, 0, self.settings.folder)
        places = {sample.path: i for i, sample in enumerate(samples)}
        hashes = torch.tensor([file_hash(path.read_bytes()) for path in paths])

        def look_up(paths: list[str]) -> Tensor:
            index = torch.tensor([places[path] for path in paths])
            return features(index, 0, hashes[index])

        return look_up

    def load(self, paths: list[str]) -> Tensor:
        return torch.stack([self.preprocess(read_image(p), rng=self.rng) for p in paths])

    def step(self, paths: list[str], captions: list[str], labels: Tensor, clock=None) -> None:
        if clock:
            return self.parts(paths, captions, labels, clock)
        device = self.settings.device
        pixels = self.load(paths).to(device, non_blocking=True)
        with self.autocast():
            text = self.text(captions).to(device, non_blocking=True).float() if self.surgery else None
            frozen = self.frozen(paths).to(device, non_blocking=True) if self.frozen else None
            loss, _, harmful, _ = self.module(pixels, labels, text, frozen=frozen)
        loss.backward(retain_graph=harmful is not None)
        if harmful is not None:
            with self.layerwise.harmful():
                harmful.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self, paths: list[str], captions: list[str], labels: Tensor, clock: Clock) -> None:
        """The step cut at the features; layer-wise surgery is timed as a whole only."""
        device, text, teacher = self.settings.device, None, None
        with clock("data"):
            pixels = self.load(paths).to(device)
        with self.autocast():
            if self.surgery:
                with clock("text"):
                    text = self.text(captions).to(device).float()
                with clock("teacher"):
                    if self.frozen:
                        teacher = self.frozen(paths).to(device)
                    else:
                        teacher = self.model.teacher_features(pixels)
            with clock("student"):
                features = self.model.student_features(pixels)
        with clock("surgery"):
            leaf = features.detach().requires_grad_()
            if self.surgery:
                out = self.model.head(leaf.float(), teacher.float(), text, labels)
                loss = out.image_loss + out.text_loss + ALIGNMENT * out.alignment_loss
            else:
                logits = self.model.head.image_head(leaf.float()).squeeze(1)
                loss = F.binary_cross_entropy_with_logits(logits, labels)
            loss.backward()
        with clock("backward"):
            features.backward(leaf.grad)
        with clock("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()


class Ceiling:
    """The matrix product of [N x L, width] with [width, 4 width] alone, in fp32 and in bf16."""

    def __init__(self, settings: Settings) -> None:
        vision = pretrained._model_config(settings.model)["vision_cfg"]
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        width, rows = vision["width"], settings.batch * tokens
        self.settings, self.flop = settings, 2 * rows * width * 4 * width
        self.pairs = {
            name: (torch.randn(rows, width), torch.randn(4 * width, width)) for name in ("fp32", "bf16")
        }
        self.pairs["bf16"] = tuple(x.bfloat16() for x in self.pairs["bf16"])
        self.pairs = {k: [x.to(settings.device) for x in pair] for k, pair in self.pairs.items()}

    def rates(self, repeats: int = 20) -> dict[str, float]:
        """Best FLOP/s of each precision."""
        best = {}
        for name, (x, w) in self.pairs.items():
            times = []
            for _ in range(repeats):
                start = now(self.settings.device)
                F.linear(x, w)
                times.append(now(self.settings.device) - start)
            best[name] = self.flop / min(times)
        return best


# Choices of ours, each undone alone: name to what replaces it.
ABLATIONS: dict[str, Callable[[], None]] = {
    "own LoRA forward": lambda: setattr(adapters.Adapter, "adapted", adapters.LoraLinear.forward),
    "dropout from 16 random bits": lambda: setattr(adapters, "_dropout", lambda x, dropout: dropout(x)),
    "attention by its formula": lambda: setattr(
        adapters, "_attention", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)
    ),
}
VARIANTS = {
    PUBLISHED: Variant("Official"),
    PUBLISHED_BF16: Variant("Official", {"bf16": True}),
    PLAIN: Variant("Ours", {"surgery": "none"}),
    OURS: Variant("Ours"),
    STORED: Variant("Ours", {"stored": True}),
}
CHOICES = {
    OURS: Variant("Ours"),
    "with the text encoder in the step": Variant("Ours", {"text_in_step": True}),
    "bf16 by autocast of fp32 weights": Variant("Ours", {"autocast": True}),
    "fp32": Variant("Ours", {"precision": "fp32"}),
    "optimiser not fused": Variant("Ours", {"fused": False}),
    **{f"without: {name}": Variant("Ours", without=name) for name in ABLATIONS},
    "torch.compile": Variant("Ours", {"compile": "default"}),
    "activation checkpointing": Variant("Ours", {"checkpointing": True}),
    "surgery by layer": Variant("Ours", {"surgery": "layer"}),
}


# -- running them ----------------------------------------------------------------------------------------

# Batches of different images and captions.
POOL = 8
# Images of the step whose work is counted; attention by its formula takes memory.
COUNTED = 8


def sentences(batch: int, number: int) -> list[str]:
    rng = np.random.default_rng(number)
    return [" ".join(rng.choice(WORDS, TOKENS)) for _ in range(batch)]


def write_images(settings: Settings) -> None:
    rng = np.random.default_rng(0)
    photographs = [p for p in PHOTOGRAPHS["train"] if min(p.pixels().shape[:2]) >= settings.image]
    for i in range(POOL * settings.batch):
        crop, _ = sample_crop(photographs[i % len(photographs)], settings.image, rng)
        Image.fromarray(np.ascontiguousarray(crop)).save(Path(settings.folder) / f"{i}.png", compress_level=1)


def batch_of(settings: Settings, number: int) -> tuple[list[str], list[str], Tensor]:
    number %= POOL
    first = number * settings.batch
    paths = [str(Path(settings.folder) / f"{first + i}.png") for i in range(settings.batch)]
    labels = (torch.arange(settings.batch) % 2).float().to(settings.device)
    return paths, sentences(settings.batch, number), labels


def child(connection, settings: Settings, variant: Variant) -> None:
    """A process with one variant: answers "step", "parts", "flop" and "memory" until told None."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    try:
        if variant.without:
            ABLATIONS[variant.without]()
        made = globals()[variant.kind](settings, **variant.options)
        if isinstance(made, Ceiling):
            connection.send(made.rates())
            return
        connection.send("built")
        connection.recv()
        made.step(*batch_of(settings, 0))
        made.step(*batch_of(settings, 1))
        reset_peak(settings.device)
        connection.send("ready")
        number = 2
        while (order := connection.recv()) is not None:
            connection.send(answer(made, settings, order, number))
            number += 1
    except torch.OutOfMemoryError:
        connection.send("out of memory")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


def answer(made: Official | Ours, settings: Settings, order: str, number: int) -> Any:
    batch = batch_of(settings, number)
    if order == "step":
        # Images come from other processes: not this one's time.
        if settings.workers:
            pixels = made.load(batch[0])
            made.load = lambda paths: pixels
        # The others had its memory meanwhile.
        if settings.device == "cuda":
            made.step(*batch)
        start, cpu = now(settings.device), time.process_time()
        made.step(*batch)
        seconds = now(settings.device) - start, time.process_time() - cpu
        made.__dict__.pop("load", None)
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        return seconds
    if order == "parts":
        clock = Clock(settings.device)
        made.step(*batch, clock)
        return clock.seconds
    if order == "flop":
        # Attention is counted by its formula, and compiled code by what it was compiled from.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounter() as counter,
        ):
            made.step(*(x[:COUNTED] for x in batch))
        return counter.flop / min(COUNTED, settings.batch)
    return peak(settings.device)


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes: allocated on the device, or resident in memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(settings: Settings, variants: dict[str, Variant], seconds: float) -> dict[str, Any]:
    """Let all take turns for about so many seconds; returns what the result file holds."""
    context = get_context("spawn")
    write_images(settings)

    def start(variant: Variant):
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs, settings, variant), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def ask(name: str, order: str) -> Any:
        connections[name].send(order)
        return connections[name].recv()

    _, pipe = start(Variant("Ceiling"))
    ceiling = pipe.recv()
    processes, connections, failed = {}, {}, {}
    cuda = settings.device == "cuda"
    # With many cores, all are built at once.
    for name, variant in variants.items() if cuda else ():
        processes[name], connections[name] = start(variant)
    for name, variant in variants.items():
        if not cuda:
            processes[name], connections[name] = start(variant)
        said = connections[name].recv()
        if said == "built":
            said = ask(name, "warm up")
        if said != "ready":
            failed[name] = said
            del connections[name]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in connections}
    parts: dict[str, list[dict]] = {name: [] for name in connections}
    began = time.perf_counter()
    while min(map(len, samples.values())) < MIN_ROUNDS or time.perf_counter() - began < seconds:
        for name in connections:
            samples[name].append(ask(name, "step"))
    results = {name: {"error": reason} for name, reason in failed.items()}
    memory = {name: ask(name, "memory") for name in connections}
    for _ in range(MIN_ROUNDS):
        for name in connections:
            parts[name].append(ask(name, "parts"))
    for name in connections:
        flop = ask(name, "flop")
        wall, cpu = zip(*samples[name])
        median = statistics.median(wall)
        low = variants[name].options.get("precision", "bf16") == "bf16" and variants[name].kind == "Ours"
        low |= variants[name].options.get("bf16", False)
        results[name] = {
            "images_per_second": settings.batch / median,
            "median_s": median,
            "min_s": min(wall),
            "max_s": max(wall),
            # It is the time of all threads; other processes lengthen it less.
            "cpu_median_s": statistics.median(cpu),
            "rounds": len(wall),
            "peak_bytes": memory[name],
            "gflop_per_image": flop / 1e9,
            "precision": "bf16" if low else "fp32",
            "share_of_ceiling": flop * settings.batch / median / ceiling["bf16" if low else "fp32"],
            "parts_s": {part: statistics.median(p[part] for p in parts[name]) for part in PARTS},
        }
        connections[name].send(None)
        processes[name].join()
    return {
        **{k: v for k, v in asdict(settings).items() if k != "folder"},
        "operation": "train_step",
        "ceiling_flop_per_second": ceiling,
        "variants": {name: results[name] for name in variants},
    }


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table: ratios to the first variant, processor time of a step, parts in ms."""
    variants = result["variants"]
    first = next(v for v in variants.values() if "error" not in v)
    head = ["", "images/s", "ratio", "CPU s", "peak GiB", "GFLOP/image", "of ceiling", *PARTS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, v in variants.items():
        if "error" in v:
            lines.append(f"| {name} | {v['error']} |" + " |" * (len(head) - 2))
            continue
        cells = [
            name,
            f"{v['images_per_second']:.2f}",
            f"{v['images_per_second'] / first['images_per_second']:.2f}",
            f"{v['cpu_median_s']:.2f}",
            f"{v['peak_bytes'] / 2**30:.2f}",
            f"{v['gflop_per_image']:.1f}",
            f"{v['share_of_ceiling']:.0%}",
            *(f"{1e3 * v['parts_s'][part]:.1f}" for part in PARTS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rates = ", ".join(f"{k} {v / 1e12:.2f}" for k, v in result["ceiling_flop_per_second"].items())
    return "\n".join([*lines, "", f"matrix ceiling, TFLOP/s: {rates}"])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train_step", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="ViT-L-14-quickgelu" if cuda else "ViT-B-32")
    parser.add_argument("--batch", type=int, nargs="+", default=[32] if cuda else [16])
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--image", type=int, default=256, help="side of the image files in pixels")
    parser.add_argument(
        "--workers",
        type=int,
        default=(os.cpu_count() or 1) if cuda else 0,
        help="0: decode in the step; else the loader's processes do, and data is timed for one of them",
    )
    parser.add_argument("--seconds", type=float, default=60, help="time for the rounds of one batch size")
    parser.add_argument("--choices", action="store_true", help="undo each of our choices alone instead")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=Path("runs/train_step.json"))
    a = parser.parse_args(arguments)
    variants = CHOICES if a.choices else VARIANTS
    for name in a.variants or ():
        if name not in variants:
            parser.error(f"unknown variant {name!r}; expected {', '.join(variants)}")
    variants = {name: v for name, v in variants.items() if not a.variants or name in a.variants}
    results = []
    for batch in a.batch:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(a.model, batch, a.device, a.threads, a.image, folder, a.workers)
            print(f"\ntrain_step {a.model} batch={batch} device={a.device} threads={a.threads}", flush=True)
            results.append(measure(settings, variants, a.seconds))
            print(table(results[-1]), flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"machine": harness.machine(a.device), "results": results}, indent=1) + "\n")
    print(f"\nwritten: {a.out}")
