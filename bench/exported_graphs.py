"""Towers in every runtime for `bench.export`: written, checked, and their figures but for speed."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.classifier import class_embeddings, prompts_of
from clipkernels.exporting import int8_onnx, int8_openvino, onnx, openvino, pt2
from clipkernels.exporting.embeddings import ImageEmbedding
from clipkernels.exporting.graphs import check_slow, count_slow, graphs_of
from clipkernels.exporting.memory import peak_memory
from clipkernels.exporting.parity import encode_all, measure_parity
from clipkernels.exporting.report import Products
from clipkernels.exporting.towers import IMAGE_NAMES
from clipkernels.measure.timing import Variant, vary
from clipkernels.runtime.engines import HINTS, load_engine

RUNTIMES = {
    "eager": ("torch", "fp32"),
    "eager bf16": ("torch", "bf16"),
    "frozen": ("frozen", "fp32"),
    "frozen bf16": ("frozen", "bf16"),
    "torch.export": ("pt2", "fp32"),
    "onnxruntime": ("onnx", "fp32"),
    "onnxruntime int8": ("onnx", "int8"),
    "openvino": ("openvino", "fp32"),
    "openvino bf16": ("openvino", "bf16"),
    "openvino int8": ("openvino", "int8"),
}
TORCH = ("torch", "frozen")
MIN_NEAR = {"dense": 0.99, "reduced": 0.9}
TEMPLATE = "a photo of a {}."


class Images(NamedTuple):
    """Images (n,3,S,S) to compare on, others to calibrate with, and of the bundled tower labels and class names."""

    compared: Tensor
    calibration: Tensor
    labels: Tensor | None = None
    classes: Sequence[str] = ()


class Graph(NamedTuple):
    """A variant in a runtime: how it encodes images (B,3,S,S) float32, and its figures but for speed."""

    variant: Variant
    figures: Mapping[str, Any]


def export_all(
    model: nn.Module,
    methods: Mapping[str, ck.Method | None],
    runtimes: Sequence[str],
    images: Images,
    folder: Path,
    batch_sizes: Sequence[int],
    say: Callable[[str], object],
) -> dict[str, dict[str, Graph]]:
    """Return every variant of a model in every runtime, after checking its embeddings and its graph.

    Args:
        model: the model, which is not patched.
        methods: the method of each variant; None is the host's own forward.
        runtimes: names of RUNTIMES.
        images: for comparison and calibration.
        folder: the folder of the files, which the graphs read as long as they run.
        batch_sizes: those that frozen towers are compiled for; smaller batches are filled up.
        say: takes a line about each graph.
    """
    graphs: dict[str, dict[str, Graph]] = {runtime: {} for runtime in runtimes}
    tower = ck.tower_of(model)
    for number, (name, method) in enumerate(methods.items()):
        memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        twin = copy.deepcopy(model, memo)
        module = ImageEmbedding(twin if method is None else ck.patch(twin, method)).eval()
        expected = encode_all(module, images.compared)
        for runtime in runtimes:
            to, precision = RUNTIMES[runtime]
            start, stem, products = time.process_time(), folder / f"{number}-{precision}", None
            if to in TORCH:
                file, variant = None, in_torch(model, method, to, precision, batch_sizes)
            else:
                file, products = write_graph(module, images, expected, to, precision, stem, folder / f"{number}.onnx")
                exact = tower.pools_cls and method is not None
                variant = Variant(as_function(to, precision, file), method or ck.Dense(), exact)
            figures = {"write_seconds": round(time.process_time() - start, 1)}
            figures |= figures_of(variant.encode, model, images, expected)
            figures |= graph_figures(file, to, precision, images, products, name if method else None)
            check(figures, f"{name} in {runtime}", precision, method)
            graphs[runtime][name] = Graph(variant, figures)
            say(f"{name}, {runtime}: {figures}")
    return graphs


def in_torch(
    model: nn.Module, method: ck.Method | None, way: str, precision: str, batch_sizes: Sequence[int]
) -> Variant:
    """Return a method on a model as PyTorch runs it, eager or by `ck.compile` with frozen weights."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = model if precision == "fp32" else copy.deepcopy(model).to(dtype)
    freeze = partial(ck.compile, freeze=True, batch_sizes=batch_sizes)
    variant = vary(model, {"": method}, freeze if way == "frozen" else None)[""]

    def encode(images: Tensor) -> Tensor:
        embeddings: Any = variant.encode(images.to(dtype))
        return embeddings.float()

    return variant._replace(encode=encode)


def write_graph(
    module: nn.Module, images: Images, expected: Tensor, to: str, precision: str, stem: Path, source: Path
) -> tuple[Path, Products | None]:
    """Return the file of a variant in a runtime and its products in INT8; the ONNX file is written once per variant."""
    example = images.compared[:2]
    if to == "pt2":
        file = stem.with_suffix(pt2.SUFFIX)
        pt2.write(module, example, IMAGE_NAMES, file)
        return file, None
    if not source.exists():
        onnx.write(module, example, IMAGE_NAMES, source)
    if to == "onnx" and precision == "fp32":
        return source, None
    if to == "onnx":
        file = Path(shutil.copy(source, stem.with_suffix(onnx.SUFFIX)))
        return file, int8_onnx.quantise(file, images.calibration, None, images.compared, expected)
    file = stem.with_suffix(openvino.SUFFIX)
    openvino.convert(source, file, half=precision == "bf16")
    if precision != "int8":
        return file, None
    return file, int8_openvino.quantise(file, images.calibration, None, images.compared, expected)


def as_function(to: str, precision: str, file: Path) -> Callable[[Tensor], Tensor]:
    """Return a graph as a function on one CPU thread."""
    run = load_engine(to, precision, file, dict(zip(("input", "output"), IMAGE_NAMES, strict=True)), 1)
    return lambda batch: torch.from_numpy(run(batch.numpy()))


def figures_of(encode: Callable[[Tensor], Any], model: nn.Module, images: Images, expected: Tensor) -> dict[str, Any]:
    """Return the parity of embeddings with the expected ones, and the zero-shot accuracy where there are labels."""
    actual = encode_all(encode, images.compared)
    parity = measure_parity(actual, expected).record()
    if images.labels is None:
        return {**parity, "accuracy": None}
    text = class_embeddings(model, ck.bundled()[2], prompts_of(images.classes, (TEMPLATE,)))
    right = (actual @ text.T).argmax(1) == images.labels
    return {**parity, "accuracy": round(right.double().mean().item(), 4)}


def graph_figures(
    file: Path | None, to: str, precision: str, images: Images, products: Products | None, method: str | None
) -> dict[str, Any]:
    """Return sizes, memory and numbers of nodes of a graph; raise ValueError for a patched one with slow nodes."""
    names = ("megabytes", "peak_megabytes", "products", "float", "nodes", "scatter", "nonzero", "loop", "if")
    if file is None:
        return dict.fromkeys(names)
    nodes = count_slow(graphs_of(to).operators(file))
    if method is not None:
        check_slow(nodes, method)
    files = [file, file.with_suffix(".bin")] if to == "openvino" else [file]
    peak = peak_memory(to, file, HINTS[precision], (8, *images.compared.shape[1:]))
    return {
        "megabytes": round(sum(part.stat().st_size for part in files) / 1e6, 2),
        "peak_megabytes": peak and round(peak / 1e6),
        "products": products and products.quantised,
        "float": products and len(products.float_names),
        **nodes,
    }


def check(figures: Mapping[str, Any], name: str, precision: str, method: ck.Method | None) -> None:
    """Raise ValueError for embeddings in fp32 that are not PyTorch's."""
    kind = "dense" if isinstance(method or ck.Dense(), ck.Dense) else "reduced"
    if precision == "fp32" and figures["near"] < MIN_NEAR[kind]:
        raise ValueError(f"{name}: expected a cosine of .9999 for {MIN_NEAR[kind]:.0%}, got {figures['near']:.1%}")
