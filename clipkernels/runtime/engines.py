"""Graphs of onnxruntime, OpenVINO and torch.export as functions from an array to an array, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clipkernels.messages import first_line
from clipkernels.runtime.packages import required

Engine = Callable[[Any], Any]
"""A function from a batch to its embeddings (B,E) float32; threads may share it."""
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's precision of the products that are not quantised, by the precision of an export."""


def load_engine(runtime: str, precision: str, file: Path, graph: Mapping[str, Any], threads: int | None) -> Engine:
    """The function of a graph.

    Args:
        runtime: "onnx", "openvino" or "pt2".
        precision: of the export.
        file: the graph.
        graph: its record, with the names `input` and `output`.
        threads: threads of a call, or None for the runtime's own choice. With pt2 they are those of the whole process.
    Raises:
        ImportError: the runtime is not installed.
        ValueError: an unknown runtime, or a file that it does not load.
    """
    loaders = {"onnx": _onnx, "openvino": _openvino, "pt2": _pt2}
    if runtime not in loaders:
        raise ValueError(f"expected one of the runtimes {', '.join(loaders)}, got {runtime!r:.40}")
    try:
        return loaders[runtime](file, HINTS[precision], graph["input"], graph["output"], threads)
    except ImportError:
        raise
    except Exception as error:  # of many kinds, by runtime
        raise ValueError(f"expected a graph that {runtime} loads, got {file}: {first_line(error)}") from error


@cache
def openvino_core() -> Any:
    """The core of this process, which is never deleted.

    OpenVINO's CPU plugin gives its thread another stack for signals, and frees it with the core that loaded the plugin.
    With a second core the thread then keeps a freed stack, and the next signal, such as Ctrl-C, ends the process.

    Raises:
        ImportError: openvino is not installed.
    """
    core = required("openvino").Core()
    core.get_versions("CPU")  # loads the plugin, before any other core does
    return core


def _onnx(file: Path, hint: str, source: str, target: str, threads: int | None) -> Engine:
    onnxruntime = required("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run([target], {source: batch})[0]


def _openvino(file: Path, hint: str, source: str, target: str, threads: int | None) -> Engine:
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino_core().compile_model(str(file), "CPU", options)
    output = compiled.output(target)
    # A request of its own for each call, because threads may not share one.
    return lambda batch: compiled.infer_new_request({source: batch})[output].copy()


def _pt2(file: Path, hint: str, source: str, target: str, threads: int | None) -> Engine:
    torch = required("torch")
    if threads is not None:
        torch.set_num_threads(threads)
    module = torch.export.load(file).module()

    def run(batch: Any) -> Any:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(batch)).float())

    return run
