"""Backbones as graphs that run without the code that made them: ONNX and torch.export, for batches of any size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch

from relssl.errors import ConfigError
from relssl.weights.written import Snippet, Source, Written, quote

_TOLERANCE = 1e-4  # a compiler may fold batch norm and reorder sums, in fp32
_LARGEST_ONNX = 2**31 - (1 << 24)  # bytes: a protobuf message holds 2 GiB at most


def as_onnx(source: Source) -> Written:
    """An ONNX graph in one file: `images` float32 [N, C, S, S] to `features` float32 [N, F]."""
    held = sum(value.nbytes for value in source.backbone.state_dict().values())
    if held > _LARGEST_ONNX:
        raise ConfigError(f"format: onnx holds 2 GiB in one file, {source.config.backbone} takes {held} bytes; use torch-export")

    def trace(images: torch.Tensor, shapes: Any) -> bytes:
        program = torch.onnx.export(
            source.backbone,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=shapes,
        )
        assert program is not None
        data: bytes = program.model_proto.SerializeToString()
        return data

    def lines(file: str) -> list[str]:
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({quote(file)})"]

    use = 'features = session.run(["features"], {"images": images})[0]'
    snippet = Snippet("ONNX Runtime", lines, use, arrays=True, tolerance=_TOLERANCE)
    return Written(_traced(source, "onnx", trace), (snippet,), exact=False)


def as_torch_export(source: Source) -> Written:
    """A torch.export program, which plain torch loads."""

    def trace(images: torch.Tensor, shapes: Any) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(source.backbone, (images,), dynamic_shapes=shapes), buffer)
        return buffer.getvalue()

    def lines(file: str) -> list[str]:
        return ["import torch", f"backbone = torch.export.load({quote(file)}).module()"]

    return Written(_traced(source, "torch-export", trace), (Snippet("torch alone", lines, tolerance=_TOLERANCE),), exact=False)


def _traced(source: Source, name: str, trace: Callable[[torch.Tensor, Any], bytes]) -> bytes:
    """Trace with a batch of two, for one would be taken for a constant."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about torch's own code; what comes of it is compared
        try:
            return trace(torch.zeros(2, source.config.views.channels, source.size, source.size), shapes)
        except Exception as error:  # whatever torch raises over a network that it cannot follow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"format: {name}: torch cannot trace {source.config.backbone} ({reason}); use safetensors or timm"
            ) from error
