"""The precisions of a graph, by runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.exporting.graphs import graphs_of
from clipkernels.exporting.images import noise
from clipkernels.exporting.report import Products

PRECISIONS = ("fp32", "bf16", "int8")


class HalfPrecision(nn.Module):
    """A module whose copy computes in bf16, from and to float32; inputs that are no floats stay as they are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's output in float32."""
        output: Tensor = self.module(inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs)
        return output.float()


def check_precision(to: str, precision: str, calibrate: Any, layout: str | None) -> None:
    """Raise ValueError for a precision that a runtime does not have, or for INT8 without images to calibrate it."""
    if (to, precision) == ("onnx", "bf16"):
        raise ValueError(
            'precision must be "fp32" or "int8" with to="onnx", got "bf16", whose products onnxruntime lacks on a '
            'CPU: use to="openvino"'
        )
    if (to, precision) == ("pt2", "int8"):
        raise ValueError(
            'precision must be "fp32" or "bf16" with to="pt2", got "int8": quantise the patched model with torchao, or '
            'use to="openvino"'
        )
    if precision == "int8" and calibrate is None:
        raise ValueError("expected calibrate=, images whose activations give the scales of INT8, got None")
    if calibrate is not None and precision != "int8":
        raise ValueError(f'expected precision="int8" with calibrate, got "{precision}"')
    if layout == "immich" and to != "onnx":
        raise ValueError(f'expected to="onnx" with layout="immich", which runs ONNX alone, got "{to}"')


def write_image(
    module: nn.Module,
    file: Path,
    to: str,
    precision: str,
    names: tuple[str, str],
    calibration: Tensor | None,
    min_cosine: float | None,
    images: Tensor,
    fp32: Tensor,
) -> Products | None:
    """Write the graph of an image tower.

    Args:
        module: from images to embeddings, in float32.
        file: the file to write.
        to, precision: the runtime and the precision.
        names: of the input and the output.
        calibration: (m,3,S,S) for INT8.
        min_cosine: least first percentile of the cosine that INT8 keeps, or None.
        images: (n,3,S,S) on which a graph in INT8 is compared with float32.
        fp32: (n,E) their embeddings in float32.
    Returns:
        The products of a graph in INT8, otherwise None.
    """
    write_graph(module, noise(2, images.shape[1:]), names, file, to, precision)
    if precision != "int8":
        return None
    assert calibration is not None
    quantise: Callable[..., Products] = import_module(f"clipkernels.exporting.int8_{to}").quantise
    return quantise(file, calibration, min_cosine, images, fp32)


def write_text(module: nn.Module, file: Path, to: str, precision: str, names: tuple[str, str], ids: Tensor) -> None:
    """Write the graph of a text tower from ids (n,L). In INT8 its weights alone are INT8, because texts are few."""
    write_graph(module, ids[:2], names, file, to, precision)
    if precision == "int8":
        import_module(f"clipkernels.exporting.int8_{to}").compress(file)


def write_graph(
    module: nn.Module, example: Tensor, names: tuple[str, str], file: Path, to: str, precision: str
) -> None:
    """Write the graph of a module from a batch like the example to a batch; INT8 begins as fp32."""
    graphs = graphs_of(to)
    if precision == "bf16" and to == "pt2":
        graphs.write(HalfPrecision(module), example, names, file)
    elif precision == "bf16":
        graphs.write(module, example, names, file, half=True)
    else:
        graphs.write(module, example, names, file)
