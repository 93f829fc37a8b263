"""Variants of a tower in onnxruntime and OpenVINO, on the CPU with the threads of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.exporting.embeddings import ImageEmbedding
from clipkernels.exporting.graphs import graphs_of
from clipkernels.exporting.images import noise
from clipkernels.exporting.precision import write_graph
from clipkernels.exporting.towers import IMAGE_NAMES
from clipkernels.measure.timing import Variant
from clipkernels.methods import Dense, Method
from clipkernels.patching import patched, tower_of
from clipkernels.runtime.engines import load_engine

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
FORMS = {"onnxruntime": ("fp32",), "openvino": ("fp32", "bf16")}
"""Precisions of each runtime without images that calibrate INT8."""
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def check_runtime(runtime: str, precision: str, device: torch.device) -> None:
    """Raise ValueError for a precision or a device that a runtime of RUNTIMES does not have."""
    if device.type != "cpu":
        raise ValueError(f"expected a CPU for {runtime}, got {device}")
    if precision not in FORMS[runtime]:
        raise ValueError(f"expected {' or '.join(FORMS[runtime])} for {runtime} on a CPU, got {precision}")


def run_each(model: nn.Module, methods: Mapping[str, Method | None], runtime: str) -> dict[str, Variant]:
    """Return one variant per method, exported to a runtime in the precision of the model.

    Args:
        model: an unpatched model on the CPU, in float32 or bfloat16.
        methods: methods by name; None is the host's own forward.
        runtime: a name of RUNTIMES.
    Raises:
        ImportError: a package of the runtime is not installed.
    """
    tower, to, precision = tower_of(model), RUNTIMES[runtime], PRECISIONS[next(model.parameters()).dtype]
    whole = copy.deepcopy(model).float()
    examples, names, variants = noise(2, (3, *tower.image_size)), ("input", "output"), {}
    # Graphs may be mapped from their files as long as they run: not every system then deletes them.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, (name, method) in enumerate(methods.items()):
            file = Path(folder) / f"{number}{graphs_of(to).SUFFIX}"
            with nullcontext() if method is None else patched(whole, method):
                write_graph(ImageEmbedding(whole).eval(), examples, IMAGE_NAMES, file, to, precision)
            graph = dict(zip(names, IMAGE_NAMES, strict=True))
            run = load_engine(to, precision, file, graph, torch.get_num_threads())
            exact = method is not None and tower.pools_cls
            variants[name] = Variant(_encoder(run), method or Dense(), exact)
    return variants


def _encoder(run: Any) -> Any:
    """A function of a graph from images of any dtype to embeddings (B,E) float32."""

    def encode(images: Tensor) -> Tensor:
        return torch.from_numpy(run(images.float().numpy()))

    return encode
