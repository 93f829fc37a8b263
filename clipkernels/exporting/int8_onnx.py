"""INT8 in ONNX by onnxruntime: products with a weight alone; attention and the choice of tokens stay float."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipkernels.exporting.packages import needed
from clipkernels.exporting.report import Products

PRODUCTS = ("Conv", "Gemm", "MatMul")
TABLES = ("Gather",)
"""Operators whose first input is a table of embeddings."""
BATCH = 8


def quantise(file: Path, calibration: Tensor, min_cosine: float | None, images: Tensor, fp32: Tensor) -> Products:
    """Replace a graph of fp32 by one whose products with a weight are INT8.

    Activations have one scale per tensor, by their least and largest value, and weights one per output channel. No
    product goes back to float: a limit that is not kept is an error of the export.

    Args:
        file: the graph in fp32, which is replaced.
        calibration: images (n,3,S,S) whose activations give the scales.
        min_cosine, images, fp32: of no use here.
    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: the graph has other operations in INT8.
    """
    onnx, onnxruntime = needed("onnx", "onnxruntime")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    temporary = file.with_name(f".{file.name}")
    with quietly():
        options = onnxruntime.SessionOptions()
        # Weights that are parts of others, such as a query's, become weights of their own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(temporary)
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(temporary))
    names = products_of(model)
    [source] = model.graph.input
    batches = iter({source.name: batch.numpy()} for batch in calibration.split(BATCH))
    reader = type("Reader", (), {"get_next": lambda self: next(batches, None)})()
    with quietly():
        quantize_static(
            model, str(temporary), reader, quant_format=QuantFormat.QDQ, nodes_to_quantize=names, per_channel=True,
            op_types_to_quantize=list(PRODUCTS), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "DefaultTensorType": onnx.TensorProto.FLOAT, "QDQDisableWeightAdjustForInt32Bias": True,
                "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
            },
        )  # fmt: skip
    model = onnx.load(str(temporary))
    _restore_others(model, names)
    products = check_products(model, names)
    onnx.save(model, str(temporary))
    os.replace(temporary, file)
    return products


def products_of(model: Any) -> list[str]:
    """The names of the products of an ONNX model with a weight.

    Raises:
        ValueError: a weight that is computed from others.
    """
    weights = {weight.name for weight in model.graph.initializer}
    computed = set(weights)
    for node in model.graph.node:
        if all(name in computed for name in node.input):
            computed |= {*node.output}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS and computed & {*node.input[:2]}]
    if wrong := [node.name for node in products if not weights & {*node.input[:2]}]:
        raise ValueError(f"expected weights that are stored, got one that is computed in {wrong[0]}")
    return [node.name for node in products]


def check_products(model: Any, names: list[str]) -> Products:
    """The products of a quantised model, after checking that they and nothing else are INT8.

    Raises:
        ValueError: a product in float, or another operation in INT8.
    """
    restored = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        inputs = restored & {*node.input}
        if node.name in names and len(inputs) < 2:
            raise ValueError(f"expected every product with a weight in INT8, got {node.name} in float")
        if node.name not in names and inputs:
            raise ValueError(f"expected INT8 in products with a weight alone, got it in {node.op_type} {node.name}")
    return Products(len(names))


def _restore_others(model: Any, names: list[str]) -> None:
    """Let the other operations of a quantised model read activations before they are rounded for the products."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in names:
            continue
        for index, name in enumerate(node.input):
            maker = makers.get(name)
            rounded = makers.get(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
            if rounded is not None and rounded.op_type == "QuantizeLinear":
                node.input[index] = rounded.input[0]


def compress(file: Path) -> None:
    """Replace a graph of fp32 by one whose weights are stored in INT8, and whose products compute in float."""
    (onnx,) = needed("onnx")
    model = onnx.load(str(file))
    weights = {weight.name: weight for weight in model.graph.initializer}
    axes: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in TABLES and node.input[0] in weights:
            axes[node.input[0]] = 0
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            axes[node.input[1]] = 0 if transposed else 1
    for name, axis in axes.items():
        value = onnx.numpy_helper.to_array(weights[name])
        if value.dtype != np.float32 or value.ndim != 2:
            continue
        scale = np.maximum(np.abs(value).max(1 - axis), np.finfo(np.float32).tiny) / 127
        rounded = np.rint(value / np.expand_dims(scale, 1 - axis)).astype(np.int8)
        model.graph.initializer.remove(weights[name])
        parts = {f"{name}_int8": rounded, f"{name}_scale": scale.astype(np.float32)}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(part, key) for key, part in parts.items())
        node = onnx.helper.make_node("DequantizeLinear", [*parts], [name], name=f"{name}_dequantize", axis=axis)
        model.graph.node.insert(0, node)
    onnx.save(model, str(file))


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the advice of onnxruntime's quantiser, which is about preprocessing that these graphs do not need."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
