"""`dgsnet export`: a trained detector in formats that other programs run, with a model card beside it.

The exported model takes prepared pixels; how they are prepared and how scores become decisions, the contract,
is written into the file. docs/export.md describes the formats.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dgsnet.data.captioning import quiet_transformers
from dgsnet.detection import arguments
from dgsnet.detection.monitor import MONITOR_FILE
from dgsnet.errors import UserError
from dgsnet.exchange.huggingface import form_of, frozen_encoder
from dgsnet.exchange.model_card import model_card
from dgsnet.files import check_new
from dgsnet.model.description import DETECTOR_FILE, Description
from dgsnet.model.folders import CALIBRATION_FILE, model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from dgsnet.detection.detector import Detector

Format = Literal["onnx", "torchscript", "safetensors", "hf"]
# Key of the contract, as JSON, in a file's metadata; and its file in a folder.
CONTRACT = "dgsnet"
CONTRACT_FILE = "dgsnet.json"
# Exported and original scores may differ by this much before an export is refused.
TOLERANCE = 1e-4


def export_command(model: str, format: Format, out: str, pretrained: arguments.Pretrained = None) -> None:
    """Write a detector as one file that runs without dgsnet, or as a transformers model with a peft adapter.

    Args:
        model: a model folder, or the folder of a training run.
        format: onnx, torchscript and safetensors have the adapters merged; hf keeps them apart.
        out: the file to write, or for hf a new folder; the model card lies beside it, or in it.
    """
    card = export(model, out, format, pretrained=pretrained)
    print(f"{out}: {format}, verified against the original; model card {card}")
    if format == "onnx":
        print(f"dgsnet predict, evaluate, calibrate, monitor and serve take it as --model {out}")


def export(model: str | Path, out: str | Path, format: Format, *, pretrained: str | None = None) -> Path:
    """Export a detector with its calibration, check that its scores are the original's, write its model card.

    The arguments are `export_command`'s.

    Returns:
        The model card, Markdown: `<out>.md`, or README.md in the folder.

    Raises:
        UserError: no such model or format, a package missing, a folder in use, or scores that differ.

    Example:
        >>> export("runs/mine", "mine.onnx", "onnx")  # doctest: +SKIP
    """
    from dgsnet.detection.detector import Detector

    if format not in get_args(Format):
        raise UserError(f"unknown format {format}: give one of {', '.join(get_args(Format))}")
    out = Path(out)
    if format == "hf":
        check_new(out)
    elif out.is_dir():
        raise UserError(
            f"{out} is a folder: give --out the name of a file, such as {out / f'model.{format}'}"
        )
    # This refuses an .onnx, which Detector.load takes.
    model_folder(model)
    detector = Detector.load(model, "cpu", pretrained=pretrained)

    from dgsnet.detection.batches import Batches, ready
    from dgsnet.model.checkpoint import read_extra

    # The export is fp32, whatever the calibration's scores were made in.
    expected = Batches(ready(detector.model, "fp32"), 1)(_pixels(detector))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        new = Path(folder) / out.name
        with warnings.catch_warnings(), quiet_transformers():
            # Exporters announce their successors.
            warnings.simplefilter("ignore")
            forward = _WRITERS[format](detector, new)
        _check(forward, _pixels(detector), expected, format)
        card = new / "README.md" if format == "hf" else new.with_name(f"{out.name}.md")
        card.write_text(model_card(detector, read_extra(model), contract(detector), out, format))
        if format == "hf":
            if out.exists():
                out.rmdir()
            os.rename(new, out)
            return out / card.name
        if format == "onnx":
            _describe(detector, new)
            # They may be of another network that was called so.
            for name in (CALIBRATION_FILE, MONITOR_FILE):
                Path(f"{out}.{name}").unlink(missing_ok=True)
        # Large ONNX models have a second file.
        for path in sorted(new.parent.iterdir()):
            os.replace(path, out.parent / path.name)
    return out.parent / card.name


def _describe(detector: Detector, path: Path) -> None:
    """Write beside an .onnx what `Detector.load` takes with it.

    A calibration whose scores were made in another precision than ONNX Runtime's does not hold there: its
    temperature and threshold alone are kept.
    """
    # Adapters are merged, and the weights are in the graph.
    merged: dict[str, Any] = {"model": replace(detector.config.model, pretrained="", lora_rank=0)}
    merged["preprocess"] = replace(detector.config.preprocess, crops=detector.crops)
    said, rule = replace(detector.description or Description(), **merged), detector.calibration
    if rule and rule.precision == "fp32":
        Path(f"{path}.{CALIBRATION_FILE}").write_text(replace(rule, batch=1).to_json())
    elif rule:
        said = replace(said, temperature=rule.temperature, threshold=min(max(rule.threshold, 1e-6), 1 - 1e-6))
    Path(f"{path}.{DETECTOR_FILE}").write_text(said.to_json())


def contract(detector: Detector) -> dict[str, Any]:
    """What a program must know to use the exported model: input, preprocessing, outputs, decisions."""
    from dgsnet.config import NATIVE, NORMALIZATIONS
    from dgsnet.detection.decisions import DECIMALS

    preprocess, size = detector.config.preprocess, detector.model.image_size
    mean, std = NORMALIZATIONS[preprocess.normalization]
    how = {name: getattr(preprocess, name) for name in NATIVE} | {"crops": detector.crops}
    if preprocess.mode == "patches":
        how = {"patch_size": preprocess.patch_size, "num_patches": preprocess.num_patches}
    c = detector.calibration
    return {
        "version": 1,
        "input": {"name": "pixels", "dtype": "float32", "shape": ["batch", 3, size, size], "channels": "RGB"},
        "preprocess": {
            "mode": preprocess.mode,
            "image_size": size,
            **how,
            "scale": "pixel / 255, minus mean, divided by std",
            "mean": list(mean),
            "std": list(std),
            "views": detector.views,
        },
        "outputs": {
            "logits": "[batch] float32, positive is generated; averaged over an image's crops and views",
            "probabilities": "[batch] float32, sigmoid(logits / temperature)",
        },
        "head": {"feature": detector.config.model.feature, "l2": detector.config.model.l2},
        "decision": {
            "temperature": detector.temperature,
            "generated_above": detector.threshold,
            "real_at_or_below": c.low if c else detector.threshold,
            "decimals_before_comparing": DECIMALS,
            "calibrated": c is not None,
            "precision": detector.precision,
        },
    }


def _module(detector: Detector) -> Any:
    """Pixels to logits and probabilities, with the adapters merged into the weights."""
    import torch

    from dgsnet.model.adapters import merge_adapters

    l2 = detector.config.model.l2

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = detector.model.visual
            self.head = detector.model.head.image_head
            self.temperature = detector.temperature

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(_scaled(self.visual(pixels), l2)).squeeze(-1)
            return logits, torch.sigmoid(logits / self.temperature)

    merge_adapters(detector.model.visual)
    return Exported().eval().requires_grad_(False)


def _write_onnx(detector: Detector, path: Path) -> Callable[[Tensor], Any]:
    import torch

    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"this needs the package {error.name}: pip install 'dgs-kernels[export]'") from None

    program = torch.onnx.export(
        _module(detector),
        (_pixels(detector),),
        dynamo=True,
        input_names=["pixels"],
        output_names=["logits", "probabilities"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    # dynamo=True returns one.
    assert program
    # Notes for debugging the exporter hold paths of this machine.
    for node in program.model.graph:
        node.metadata_props.clear()
    program.model.metadata_props[CONTRACT] = json.dumps(contract(detector))
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


def _write_torchscript(detector: Detector, path: Path) -> Callable[[Tensor], Any]:
    import torch

    traced = torch.jit.trace(_module(detector), (_pixels(detector),))
    torch.jit.save(traced, str(path), _extra_files={CONTRACT_FILE: json.dumps(contract(detector))})
    loaded = torch.jit.load(str(path))
    return lambda pixels: loaded(pixels)[0]


def _write_safetensors(detector: Detector, path: Path) -> Callable[[Tensor], Any]:
    from safetensors.torch import load_file, save_file

    from dgsnet.model.pretrained import untouched_tower

    module, config = _module(detector), detector.config.model
    state = {f"head.{key}": tensor for key, tensor in module.head.state_dict().items()}
    for key, tensor in detector.model.backbone.state().items():
        state[f"visual.{key}"] = tensor.contiguous()
    save_file(state, path, {"format": "pt", CONTRACT: json.dumps(contract(detector))})

    visual = untouched_tower(config.name, detector.model.image_size, config.feature).eval()
    written = load_file(path)
    tower = {key.removeprefix("visual."): t for key, t in written.items() if key.startswith("visual.")}
    visual.load_state_dict(tower, assign=True)
    return lambda pixels: _linear(_scaled(visual(pixels), config.l2), written, "head.")


def _write_hf(detector: Detector, folder: Path) -> Callable[[Tensor], Any]:
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    config = detector.config.model
    form = form_of(detector.model)
    if form is None:
        raise UserError(
            f"transformers has no model for the backbone {config.name}: export it as onnx, torchscript or "
            "safetensors"
        )
    encoder: Any = frozen_encoder(detector.model, form, config.name)
    encoder.save_pretrained(folder / "base")
    if config.lora_rank:
        adapters = detector.model.adapter_state()
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=True,
            target_modules=form.targets(adapters),
            base_model_name_or_path="../base",
        )
        adapted = get_peft_model(encoder, lora)
        names = {f"base_model.model.{form.name(key)}": tensor for key, tensor in adapters.items()}
        set_peft_model_state_dict(adapted, names)
        adapted.save_pretrained(str(folder / "adapter"))
        # This is peft's blank form; ours lies above.
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
    head = {key: tensor.contiguous() for key, tensor in detector.model.head.image_head.state_dict().items()}
    save_file(head, folder / "head.safetensors", {"format": "pt"})
    (folder / CONTRACT_FILE).write_text(json.dumps(contract(detector), indent=2) + "\n")

    loaded: Any = getattr(transformers, form.model).from_pretrained(folder / "base")
    if config.lora_rank:
        loaded = PeftModel.from_pretrained(loaded, folder / "adapter")
    loaded.eval()
    head = load_file(folder / "head.safetensors")
    return lambda pixels: _linear(_scaled(getattr(loaded(pixel_values=pixels), form.output), config.l2), head)


def _pixels(detector: Detector) -> Tensor:
    """Three inputs of the kind that the model sees, always the same ones."""
    import torch

    size = detector.model.image_size
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def _check(forward: Callable[[Tensor], Any], pixels: Tensor, expected: Tensor, format: str) -> None:
    """Compare probabilities of the exported model, reloaded, with the original's, in two batch sizes."""
    import torch

    with torch.inference_mode():
        for batch in (pixels, pixels[:1]):
            logits = forward(batch).float()
            difference = (logits.sigmoid() - expected[: len(batch)].sigmoid()).abs().max().item()
            if logits.shape != batch.shape[:1] or not difference <= TOLERANCE:
                raise UserError(
                    f"the {format} export gives other scores than the model (by up to {difference:.2g}): "
                    "nothing was written; please report the versions of torch and of the exporter"
                )


def _scaled(features: Tensor, l2: bool) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True) if l2 else features


def _linear(features: Tensor, head: dict[str, Tensor], prefix: str = "") -> Tensor:
    return (features @ head[f"{prefix}weight"].T + head[f"{prefix}bias"]).squeeze(-1)


_WRITERS: dict[str, Callable[[Detector, Path], Callable[[Tensor], Any]]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "safetensors": _write_safetensors,
    "hf": _write_hf,
}
