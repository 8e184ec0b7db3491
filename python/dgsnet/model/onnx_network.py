"""A network in an ONNX file, with the description beside it: ONNX Runtime computes its logits on the CPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgsnet.config import Config, read_settings
from dgsnet.errors import UserError
from dgsnet.files import one_line
from dgsnet.model.description import DETECTOR_FILE, Description
from dgsnet.model.folders import beside

# Bytes of a file: protobuf, which ONNX is written in, holds no more.
MOST_BYTES = 2**31
# Operators come from these sets. Others need libraries with code, or read further files.
DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}


class OnnxNetwork(nn.Module):
    """Pixels to logits by ONNX Runtime, one image at a time, in fp32 on the CPU.

    Args:
        path: of the file; its one input takes float32 [N or 1, 3, S, S], and
            its output "logits", or its only one, has one float32 number of an image, positive for generated.
        image_size: S.

    Attributes:
        sha256: of the file, as hexadecimal digits.

    Raises:
        UserError: a package is missing, or it is no such network.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        super().__init__()
        self.path, self.image_size = path, image_size
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path} has {size} bytes: an .onnx of at most {MOST_BYTES} is taken")
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        with _refused(path):
            _check(content)
            self._session, self._input, self._output = _session(content, image_size)
        self.logits(torch.zeros(1, 3, image_size, image_size))

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits, float32 [N], of normalised images, float32 [N, 3, S, S] on the CPU.

        Raises:
            UserError: what the graph gives is no logit.
        """
        with _refused(self.path):
            return torch.cat([torch.empty(0), *map(self._one, pixels.split(1))])

    def _one(self, pixels: Tensor) -> Tensor:
        (found,) = self._session.run([self._output], {self._input: pixels.contiguous().numpy()})
        if found.dtype != "float32" or found.shape not in ((1,), (1, 1)):
            raise ValueError(
                f"its output {self._output} is {found.dtype} {list(found.shape)} of one image, and one "
                "float32 logit is needed"
            )
        return torch.from_numpy(found.reshape(1))


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, as a UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path} needs the package {error.name}: pip install 'dgs-kernels[export]'") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be taken: {one_line(error, 300)}") from None
    except Exception as error:
        # Errors of ONNX Runtime and protobuf share no class.
        raise UserError(f"{path} is damaged or no ONNX network ({one_line(error, 200)})") from None


def load_onnx(path: str | Path) -> tuple[OnnxNetwork, Config, Description]:
    """The network of an .onnx, and what the description beside it says.

    The adapters are in the graph's weights, so the configuration has none.

    Raises:
        UserError: the file or its description is missing or damaged, or they do not fit.
    """
    path = Path(path)
    said = beside(path, DETECTOR_FILE)
    if not said.is_file():
        raise UserError(
            f"{said} is missing: an .onnx needs it beside it, to say how images become its input; `dgsnet "
            "export` writes it, and docs/export.md says what is in it"
        )
    description = read_settings(said, Description)
    config = Config(
        model=replace(description.model, pretrained="", lora_rank=0), preprocess=description.preprocess
    )
    return OnnxNetwork(path, description.preprocess.image_size), config, description


def _session(content: bytes, size: int) -> tuple[Any, str, str]:
    """ONNX Runtime's session, and the names of the input and of the output with logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # What goes wrong is raised, so nothing is logged.
    options.log_severity_level = 4
    # As torch's, on which the last digits depend.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise ValueError(f"it has {len(inputs)} inputs, and pixels alone are given")
    (pixels,) = inputs
    wanted = (1, 3, size, size)
    # A side that has a name, or none, is any.
    fits = len(pixels.shape) == 4 and all(
        isinstance(side, str) or side in (None, want) for side, want in zip(pixels.shape, wanted)
    )
    if pixels.type != "tensor(float)" or not fits:
        raise ValueError(
            f"its input is {pixels.type} {list(pixels.shape)}, and the images that its description makes are "
            f"tensor(float) ['batch' or 1, 3, {size}, {size}]"
        )
    if "logits" not in outputs and len(outputs) != 1:
        raise ValueError(f"it has {len(outputs)} outputs, of which none is named logits")
    return session, pixels.name, "logits" if "logits" in outputs else outputs[0]


def _check(content: bytes) -> None:
    """ValueError where a network reads further files or needs further code, before anything runs it."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    own = {function.domain for function in model.functions}
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto):
            if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
                raise ValueError("its weights lie in further files, which are not read: write it as one file")
        elif isinstance(message, onnx.NodeProto) and message.domain not in DOMAINS | own:
            raise ValueError(
                f"it needs the operator {message.op_type[:80]} of {message.domain[:80]}, and those of the "
                "ONNX standard alone are taken"
            )


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all that are in it, at any depth."""
    waiting = [message]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)
