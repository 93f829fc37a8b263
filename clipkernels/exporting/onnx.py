"""ONNX graphs with a free batch size, run by onnxruntime on the CPU."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.exporting.packages import needed

SUFFIX = ".onnx"
OPSET = 20
MAX_BATCH = 1024
"""Bound of the free batch size in the trace; the graph itself has none."""
REQUIREMENTS = ("onnxruntime>=1.20",)


def write(module: nn.Module, example: Tensor, names: tuple[str, str], file: Path, opset: int = OPSET) -> None:
    """Write the graph of a module from a batch to a batch.

    Weights are in the file, or beside it if they are larger than 2 GB. The graph says nothing of the machine that
    traced it.

    Args:
        module: a module in eval mode with one input and one output.
        example: an input with a batch of at least two.
        names: of the input and the output.
        file: the file to write.
        opset: the version of ONNX's operators.
    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    onnx = needed("onnx", "onnxscript")[0]
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own operators
        program = torch.onnx.export(
            module, (example,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False,
            input_names=names[:1], output_names=names[1:],
        )  # fmt: skip
        assert program is not None
        program.save(str(file))
    model = onnx.load(str(file), load_external_data=False)
    drop_expands(model)
    _strip(model)
    onnx.save(model, str(file))


def operators(file: Path) -> Counter[str]:
    """The number of nodes of a graph by operator, those of its functions and branches included."""
    (onnx,) = needed("onnx")

    def walk(nodes: Any) -> Counter[str]:
        kinds = Counter(node.op_type for node in nodes)
        for node in nodes:
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    kinds += walk(graph.node)
        return kinds

    model = onnx.load(str(file), load_external_data=False)
    kinds = walk(model.graph.node)
    for function in model.functions:
        kinds += walk(function.node)
    return kinds


def drop_expands(model: Any) -> None:
    """Delete from an ONNX model the copies of rows before an addition that repeats them itself.

    The bias of attention by sizes of tokens is such rows. With copies, OpenVINO does not recognise the attention.
    """

    def shape(value: Any) -> list[Any]:
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    shapes = {value.name: shape(value) for value in (*model.graph.value_info, *model.graph.input)}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type != "Add":
            continue
        for index, name in enumerate(node.input):
            if name not in makers or makers[name].op_type != "Expand":
                continue
            row, rows, other = (shapes.get(x, []) for x in (makers[name].input[0], name, node.input[1 - index]))
            # Sizes that are not known are 0.
            repeated = [sizes[1:] for sizes in zip(row, rows, other, strict=False) if sizes[0] != sizes[1]]
            if len(row) == len(rows) == len(other) > 0 and all(size and size == known for size, known in repeated):
                node.input[index] = makers[name].input[0]
    names = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in [node for node in model.graph.node if node.op_type == "Expand" and node.output[0] not in names]:
        model.graph.node.remove(node)


def _strip(model: Any) -> None:
    """Delete from an ONNX model the traces of the Python code, and the shapes between its nodes."""
    # torch 2.6 names the batch size of the trace there, which onnxruntime takes for the only one.
    del model.graph.value_info[:]
    for part in (model, model.graph, *model.functions):
        del part.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
