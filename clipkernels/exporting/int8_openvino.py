"""INT8 in OpenVINO by NNCF: products with a weight alone; attention and the choice of tokens stay float."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from clipkernels.exporting.openvino import compiled, save
from clipkernels.exporting.packages import needed
from clipkernels.exporting.parity import encode_all, first_percentile
from clipkernels.exporting.report import Products
from clipkernels.runtime.engines import openvino_core

PRODUCTS = ("MatMul", "Convolution")
PASSED = ("Convert", "FakeQuantize", "Multiply", "Reshape", "Subtract", "Transpose")
"""Operations between a constant and the product that it is a weight of."""
DEFAULT_LIMIT = 0.99
"""First percentile of the cosine with fp32 below which activations are smoothed too, and the better graph is kept."""
RANKED = 32
"""Images on which products are ranked by what their quantisation costs."""


def quantise(file: Path, calibration: Tensor, min_cosine: float | None, images: Tensor, fp32: Tensor) -> Products:
    """Replace a graph of fp32 by one whose products with a weight are INT8.

    Activations have one scale per tensor, weights one per output channel. If the first percentile of the cosine with
    fp32 is below `min_cosine`, the products that cost most go back to float, as few as it takes.

    Args:
        file: the .xml file of the graph in fp32, which is replaced with the file of its weights.
        calibration: images (n,3,S,S) whose activations give the scales.
        min_cosine: least first percentile of the cosine, or None for no limit.
        images: (m,3,S,S) on which the cosine is measured.
        fp32: (m,E) their embeddings in fp32.
    Raises:
        ImportError: nncf or openvino is not installed.
        ValueError: the limit cannot be kept, or the graph has other operations in INT8.
    """
    needed("openvino", "nncf")
    model = openvino_core().read_model(str(file))
    limit = DEFAULT_LIMIT if min_cosine is None else min_cosine

    def cosine(quantised: Any) -> float:
        embeddings = encode_all(compiled(quantised, "int8"), images)
        return first_percentile(cosine_similarity(embeddings.double(), fp32.double()))

    quantised = _quantised(model, calibration, smooth=False)
    reached = cosine(quantised)
    if reached < limit:
        smoothed = _quantised(model, calibration, smooth=True)
        quantised = smoothed if cosine(smoothed) > reached else quantised
    floats: Sequence[str] = ()
    if min_cosine is not None:
        floats = _products_to_keep_float(model, quantised, min_cosine, images, fp32)
        quantised = _reverted(model, quantised, floats)
    products = check_products(quantised, floats)
    save(quantised, file)
    return products


def _quantised(model: Any, calibration: Tensor, smooth: bool) -> Any:
    """A copy of a model whose products with a weight are INT8.

    Scales cover the largest activation of all images, because embeddings suffer more from clipping than from coarse
    steps. With `smooth`, channels of large activations are divided, and their weights multiplied, before both are
    rounded; the divisions cost time.
    """
    (nncf,) = needed("nncf")
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    weighted = {operation.get_friendly_name() for operation in products_of(model)}
    names = (operation.get_friendly_name() for operation in model.get_ops())
    others = [name for name in names if name not in weighted]
    advanced = AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        smooth_quant_alphas=AdvancedSmoothQuantParameters() if smooth else AdvancedSmoothQuantParameters(matmul=-1),
    )
    with quietly():
        return nncf.quantize(
            model, nncf.Dataset([image[None].numpy() for image in calibration]), subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER, advanced_parameters=advanced,
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
        )  # fmt: skip


def compress(file: Path) -> None:
    """Replace a graph of fp32 by one whose weights are stored in INT8, and whose products compute in float."""
    _, nncf = needed("openvino", "nncf")
    model = openvino_core().read_model(str(file))
    with quietly():
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    save(model, file)


def products_of(model: Any) -> list[Any]:
    """The products of an OpenVINO model with a weight, in the order of the graph."""
    operations = model.get_ordered_ops()
    return [
        operation
        for operation in operations
        if operation.get_type_name() in PRODUCTS and _is_constant(_input(operation, 1))
    ]


def check_products(model: Any, float_names: Sequence[str]) -> Products:
    """The products of a quantised model with a weight, after checking that they and nothing else are INT8.

    Raises:
        ValueError: a product that is neither INT8 nor among those that stay float, or another operation in INT8.
    """
    products = {operation.get_friendly_name(): operation for operation in products_of(model)}
    quantised = {name for name, operation in products.items() if _is_quantised(operation)}
    if float_products := products.keys() - quantised - set(float_names):
        raise ValueError(f"expected every product with a weight in INT8, got {min(float_products)} in float")
    for operation in model.get_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        for target in operation.output(0).get_target_inputs():
            reads_shape = target.get_node().get_type_name() == "ShapeOf"
            if not reads_shape and target.get_node().get_friendly_name() not in quantised:
                name = f"{target.get_node().get_type_name()} {target.get_node().get_friendly_name()}"
                raise ValueError(f"expected INT8 in products with a weight alone, got it in {name}")
    return Products(len(quantised), tuple(float_names))


@contextmanager
def quietly() -> Iterator[None]:
    """Silence NNCF's log and its progress bars."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _products_to_keep_float(
    model: Any, quantised: Any, min_cosine: float, images: Tensor, fp32: Tensor
) -> Sequence[str]:
    """The fewest products, most expensive ones first, that must stay float for the limit."""

    def suffices(names: Sequence[str]) -> bool:
        embeddings = encode_all(compiled(_reverted(model, quantised, names), "int8"), images)
        return first_percentile(cosine_similarity(embeddings.double(), fp32.double())) >= min_cosine

    if suffices(()):
        return ()
    names = [operation.get_friendly_name() for operation in products_of(model)]
    gains = {name: _mean_cosine(_reverted(model, quantised, [name]), images[:RANKED], fp32[:RANKED]) for name in names}
    names.sort(key=lambda name: gains[name], reverse=True)
    low, high = 0, len(names)
    if not suffices(names):
        raise ValueError(
            f"expected a graph whose cosine with fp32 can be {min_cosine}, got less with every product in float"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(names[:middle]) else (middle, high)
    return names[:high]


def _mean_cosine(model: Any, images: Tensor, fp32: Tensor) -> float:
    embeddings = encode_all(compiled(model, "int8"), images)
    return cosine_similarity(embeddings.double(), fp32.double()).mean().item()


def _reverted(model: Any, quantised: Any, names: Sequence[str]) -> Any:
    """A copy of a quantised model in which the named products have input, weight and bias of the float model."""
    if not names:
        return quantised
    copy = quantised.clone()
    originals = {operation.get_friendly_name(): operation for operation in model.get_ops()}
    copies = {operation.get_friendly_name(): operation for operation in copy.get_ops()}
    for name in names:
        operation, activation = copies[name], originals[name].input_value(0)
        source = copies[activation.get_node().get_friendly_name()]  # before rounding and smoothing
        operation.input(0).replace_source_output(source.output(activation.get_index()))
        operation.input(1).replace_source_output(_constant(_input(originals[name], 1)).output(0))
        for target in list(operation.output(0).get_target_inputs()):  # NNCF corrects biases
            add = target.get_node()
            other = 1 - target.get_index()
            if add.get_type_name() == "Add" and _is_constant(_input(add, other)):
                bias = _input(originals[add.get_friendly_name()], other)
                add.input(other).replace_source_output(_constant(bias).output(0))
    copy.validate_nodes_and_infer_types()
    return copy


def _constant(node: Any) -> Any:
    """A new constant with the value of a constant expression."""
    (openvino,) = needed("openvino")
    value = openvino.Model([node.output(0)], [], "constant")
    request = openvino_core().compile_model(value, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return openvino.opset13.constant(request([])[0].copy())


def _input(operation: Any, index: int) -> Any:
    return operation.input_value(index).get_node()


def _is_constant(node: Any) -> bool:
    if node.get_type_name() == "Constant":
        return True
    return node.get_type_name() in PASSED and all(_is_constant(_input(node, at)) for at in range(node.get_input_size()))


def _is_quantised(product: Any) -> bool:
    """True for a product with an activation of 8 bits and a weight that is stored in 8 bits."""

    def stored(node: Any) -> str:
        while node.get_type_name() != "Constant":
            node = _input(node, 0)
        bits: str = node.get_element_type().get_type_name()
        return bits

    return _input(product, 0).get_type_name() == "FakeQuantize" and stored(_input(product, 1)) in ("i8", "u8")
