"""OpenVINO graphs with a free batch size, made from those of ONNX and run on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.exporting import onnx as onnx_graphs
from clipkernels.exporting.packages import needed
from clipkernels.runtime.engines import HINTS, openvino_core

SUFFIX = ".xml"
REQUIREMENTS = ("openvino>=2026.1",)


def write(module: nn.Module, example: Tensor, names: tuple[str, str], file: Path, half: bool = False) -> None:
    """Write the graph of a module from a batch to a batch, with weights in a file beside it.

    Args:
        module, example, names: as for ONNX.
        file: the .xml file to write.
        half: store the weights in 16 bits, which the runtime turns to bf16 once.
    Raises:
        ImportError: openvino, onnx or onnxscript is not installed.
    """
    needed("openvino")
    with TemporaryDirectory(dir=file.parent, prefix=".") as folder:
        source = Path(folder) / "graph.onnx"
        onnx_graphs.write(module, example, names, source)
        convert(source, file, half)


def convert(source: Path, file: Path, half: bool = False) -> None:
    """Write the graph of an ONNX file to an .xml file, with weights in a file beside it."""
    (openvino,) = needed("openvino")
    save(openvino.convert_model(str(source)), file, half)


def save(model: Any, file: Path, half: bool = False) -> None:
    """Write an OpenVINO model; the file may be the one that it was read from, whose weights are mapped."""
    (openvino,) = needed("openvino")
    temporary = file.with_name(f".{file.name}")
    openvino.save_model(model, str(temporary), compress_to_fp16=half)
    for suffix in (SUFFIX, ".bin"):
        os.replace(temporary.with_suffix(suffix), file.with_suffix(suffix))


def compiled(model: Any, precision: str) -> Callable[[Tensor], Tensor]:
    """The function of an OpenVINO model on the CPU, run as an export in a precision is."""
    needed("openvino")
    run = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": HINTS[precision]})
    return lambda batch: torch.from_numpy(run(batch.numpy())[0].copy())


def operators(file: Path) -> Counter[str]:
    """The number of operations of a graph by kind, those of its branches included."""
    needed("openvino")

    def walk(model: Any) -> Counter[str]:
        kinds = Counter(operation.get_type_name() for operation in model.get_ops())
        for operation in model.get_ops():
            if operation.get_type_name() in ("If", "Loop", "TensorIterator"):
                bodies = (
                    [operation.get_then_body(), operation.get_else_body()]
                    if operation.get_type_name() == "If"
                    else [operation.get_function()]
                )
                for body in bodies:
                    kinds += walk(body)
        return kinds

    return walk(openvino_core().read_model(str(file)))
