"""Programs of torch.export with a free batch size."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

SUFFIX = ".pt2"
REQUIREMENTS = (f"torch>={'.'.join(torch.__version__.split('.')[:2])}",)


def write(module: nn.Module, example: Tensor, names: tuple[str, str], file: Path) -> None:
    """Write the program of a module from a batch to a batch; the arguments are those of ONNX.

    Raises:
        ValueError: torch 2.6.
    """
    if torch.__version__.startswith("2.6."):  # it cannot read its own program again
        raise ValueError(f"expected a newer torch than 2.6 for pt2, got {torch.__version__}: take onnx or openvino")
    # Without a bound, which a program would check in every call.
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        torch.export.save(program, file)


def operators(file: Path) -> Counter[str]:
    """The number of calls of a program by operator."""
    graph = torch.export.load(file).graph
    names = (getattr(node.target, "__name__", str(node.target)) for node in graph.nodes if node.op == "call_function")
    return Counter(name.partition(".")[0] for name in names)
