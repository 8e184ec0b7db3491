"""The model card that `dgsnet export` writes: scope, training data, decisions, limits, use."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgsnet.detection.decisions import summary
from dgsnet.exchange.huggingface import form_of
from dgsnet.model.catalogue import has_text, timm_arguments

if TYPE_CHECKING:
    from dgsnet.config import Config
    from dgsnet.detection.detector import Detector


def model_card(
    detector: Detector, extra: dict[str, Any], contract: dict[str, Any], out: Path, format: str
) -> str:
    """The card of an exported model, Markdown.

    Args:
        detector: the model, with its calibration if any.
        extra: what is stored with it (`dgsnet.model.checkpoint.read_extra`).
        contract: `dgsnet.exchange.export.contract`.
        out: where the export will lie; its last part is named in the example.
        format: of the export.
    """
    from dgsnet.model.checkpoint import fingerprint

    config = detector.config
    adapter = (
        f"LoRA of rank {config.model.lora_rank} on {_TARGETS[config.model.lora_targets]}, scaling "
        f"{config.model.lora_alpha:g} / sqrt(rank), {'kept apart' if format == 'hf' else 'merged'}"
        if config.model.lora_rank
        else "none: a linear head on the frozen encoder"
    )
    calibration = (
        "\n".join(f"- {line}" for line in summary(detector.calibration).splitlines())
        if detector.calibration
        else "Not calibrated. The published rule, generated above 0.5, keeps no particular error rate: set a "
        "threshold with `dgsnet calibrate` on real images like those to be decided on, and export again."
    )
    code, library = _CODE[format], _library(config.model.name)
    form = form_of(detector.model)
    encoder = {"encoder": form.model, "output": form.output} if form else {}
    if not config.model.lora_rank:  # no adapter to load
        code = "\n".join(line for line in code.splitlines() if "Peft" not in line)
    return _CARD.format(
        name=out.stem,
        backbone=config.model.name,
        library=library["library"],
        fingerprint=fingerprint(detector.model),
        adapter=adapter,
        training=_training(config, extra),
        results=_results(extra),
        calibration=calibration,
        contract=json.dumps(contract, indent=2),
        code=code.format(out=out.name, **library, **encoder),
        versions=f"dgs-kernels {version('dgs-kernels')}, torch {version('torch')}",
    )


def _training(config: Config, extra: dict[str, Any]) -> str:
    if "source" in extra:
        return (
            f"Converted from the authors' checkpoint `{extra['source']}` (stage {extra['stage']}). By their "
            "account it was trained on setting II of AIGIBench: ProGAN (car, cat, chair, horse) and Stable "
            "Diffusion v1.4. That was not checked here."
        )
    # The last parts of a path name the data set; the first ones name somebody's disk.
    sources = (
        ", ".join(f"`{'/'.join(Path(path).parts[-2:])}`" for path in config.data.train) or "not recorded"
    )
    surgery = {"none": "plain fine-tuning, no gradient surgery"}.get(
        config.surgery.mode,
        f"gradient surgery ({config.surgery.mode}), alignment {config.surgery.alignment:g}",
    )
    experts = {
        "captions": config.surgery.text != "project",
        "file nuisances": config.data.nuisances != "none",
    }
    if used := [name for name, value in experts.items() if value]:
        surgery += f", experts on {' and '.join(used)}"
    if config.surgery.distillation:
        surgery += f", distillation {config.surgery.distillation:g}"
    if update := extra.get("update"):
        surgery = (
            f"an update, rule {update['rule']}, of the detector `{Path(update['model']).name}`, whose own "
            "training is not recorded here"
        )
    return (
        f"Data: {sources}. Method: {surgery}; epochs: {config.optim.epochs}"
        + (f", at most {config.optim.max_steps} steps" if config.optim.max_steps else "")
        + f", batches of {config.optim.batch_size * config.optim.accumulation}, learning rate "
        f"{config.optim.lr:g}, seed {config.seed}."
    )


def _results(extra: dict[str, Any]) -> str:
    measured = {k: v for k, v in extra.items() if isinstance(v, float)}
    if not measured:
        return "No validation results are stored with this model."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in measured.items())
    return f"On the run's validation images:\n\n| measure | value |\n|---|---|\n{rows}"


def _library(name: str) -> dict[str, str]:
    """The library that a backbone comes from, and the call that makes its image tower."""
    if has_text(name):
        return {"library": "open_clip", "tower": f'open_clip.create_model("{name}").visual'}
    arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(name).items())
    return {"library": "timm", "tower": f"timm.create_model({arguments})".replace("'", '"')}


_TARGETS = {
    "qkv": "q, k and v",
    "qkvo": "all linears of the attention",
    "mlp": "the linears of the MLP",
    "all": "all linears of the blocks",
}

_CARD = """# {name}

A detector of AI-generated images: DGS-Net (arXiv 2511.13108), CLIP fine-tuned with gradient surgery. It takes
prepared pixels and gives one score per image.

| | |
|---|---|
| backbone | {backbone} ({library}), weights with fingerprint `{fingerprint}` |
| adapters | {adapter} |
| made with | {versions} |

## Scope

Meant for ranking images by how likely a generator made them whole, as one sign among others, with a person
deciding. Not meant as proof, for deciding about people by itself, or for local edits, drawings, screenshots,
text and video frames, on which it was not measured.

## Training data

{training}

{results}

## Decisions

{calibration}

Such rates hold for images like those they were measured on. Other cameras, sizes, compression or processing
change them; calibrate again where these change.

## Limits

- Generators unlike those in the training data are missed, some of them mostly: a low score is no proof of a
  photograph.
- Strong compression, resizing, screenshots and re-encoding move scores.
- Whoever has the model can search for changes that hide an image from it.
- The backbone saw photographs from the web; subjects and styles rare there were not measured.

## Use

```python
{code}
```

Pixels are prepared as the contract says; `dgsnet.data.preprocess.Preprocessor` is the reference:

```json
{contract}
```
"""

_CODE: dict[str, str] = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{out}", providers=["CPUExecutionProvider"])
logits, probabilities = session.run(None, {{"pixels": pixels.numpy()}})  # pixels: float32 [N, 3, S, S]""",
    "torchscript": """import torch

model = torch.jit.load("{out}")
logits, probabilities = model(pixels)  # pixels: float32 [N, 3, S, S]""",
    "safetensors": """import {library}
import torch
from safetensors.torch import load_file

state = load_file("{out}")
visual = {tower}.eval()
visual.load_state_dict({{k.removeprefix("visual."): t for k, t in state.items() if k.startswith("visual.")}})
with torch.no_grad():
    features = visual(pixels)  # pixels: float32 [N, 3, S, S]
logits = torch.nn.functional.linear(features, state["head.weight"], state["head.bias"]).squeeze(-1)""",
    "hf": """import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import {encoder}

encoder = {encoder}.from_pretrained("{out}/base").eval()
encoder = PeftModel.from_pretrained(encoder, "{out}/adapter").eval()
head = load_file("{out}/head.safetensors")
with torch.no_grad():
    features = encoder(pixel_values=pixels).{output}  # pixels: float32 [N, 3, S, S]
logits = torch.nn.functional.linear(features, head["weight"], head["bias"]).squeeze(-1)""",
}
