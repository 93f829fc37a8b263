"""The towers of an export: their modules, the files of their graphs, and the proof of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.arguments import describe
from clipkernels.artefacts.contents import has_text
from clipkernels.exporting import immich
from clipkernels.exporting.embeddings import TEXTS, ImageEmbedding, TextEmbedding, example_ids
from clipkernels.exporting.parity import Parity, encode_all, measure_parity
from clipkernels.exporting.tokenizer_files import tokenizer_record
from clipkernels.runtime.encoders import Runtime
from clipkernels.runtime.engines import load_engine

IMAGE_NAMES, TEXT_NAMES = ("pixel_values", "image_embeds"), ("input_ids", "text_embeds")
"""Of the input and the output, as transformers and optimum name them."""
MIN_NEAR = {False: 1.0, True: 0.75}
"""Least share of inputs whose embedding in fp32 differs by rounding alone, of a dense and of a reduced tower.

Two tokens of an image may be nearly tied, and another runtime may choose the other one.
"""
MIN_MEAN = 0.9
"""Least mean cosine in bf16 and INT8: less is another model."""


class Tower(NamedTuple):
    """A tower to export: its module, where its graph goes, and inputs (n,…) with their embeddings (n,E) in PyTorch."""

    module: nn.Module
    file: str
    names: tuple[str, str]
    inputs: Tensor
    expected: Tensor


def make_towers(
    model: nn.Module, images: Tensor, tokenizer: Any, folder: Path, suffix: str, layout: str | None
) -> tuple[dict[str, Tower], dict[str, Any] | None]:
    """The image tower, the text tower if the model has one, and the record of the tokenizer, whose file is written.

    Args:
        model: the model in float32.
        images: (n,3,S,S) for the comparison.
        tokenizer: as in `ck.export`.
        folder: the folder of the files.
        suffix: of the graphs.
        layout: "immich", or None.
    Raises:
        ValueError: a tokenizer for a model without text, one that cannot be written, a length that is not known, or
            embeddings that are not finite.
    """
    unit = layout is not None  # immich compares normalised embeddings
    file, names = (immich.IMAGE, immich.IMAGE_NAMES) if unit else (f"image{suffix}", IMAGE_NAMES)
    towers = {"image": _tower(ImageEmbedding(model, unit), file, names, images)}
    if not has_text(model):
        if tokenizer is not None:
            raise ValueError(f"tokenizer must be None for a model without text, got {describe(tokenizer)}")
        return towers, None
    ids = example_ids(model, tokenizer)
    file, names = (immich.TEXT, immich.TEXT_NAMES) if unit else (f"text{suffix}", TEXT_NAMES)
    towers["text"] = _tower(TextEmbedding(model, unit), file, names, ids.int() if unit else ids)
    return towers, None if tokenizer is None else tokenizer_record(tokenizer, ids.shape[1], folder)


def _tower(module: nn.Module, file: str, names: tuple[str, str], inputs: Tensor) -> Tower:
    """A tower with the embeddings of its inputs.

    Raises:
        ValueError: they are not finite.
    """
    expected = encode_all(module, inputs)
    if not expected.isfinite().all():
        raise ValueError(f"expected finite {names[1]} of the model, got NaN or infinity: check its weights")
    return Tower(module, file, names, inputs, expected)


def prove_graph(tower: Tower, folder: Path, to: str, precision: str, reduced: bool) -> Parity:
    """The parity of a graph that is read again.

    Raises:
        ValueError: its embeddings are not those of PyTorch.
    """
    graph = {"input": tower.names[0], "output": tower.names[1]}
    run = load_engine(to, precision, folder / tower.file, graph, None)
    encode = lambda batch: torch.from_numpy(run(batch.numpy()))  # noqa: E731
    parity = measure_parity(encode_all(encode, tower.inputs), tower.expected)
    fails = parity.near < MIN_NEAR[reduced] if precision == "fp32" else parity.cosine_mean < MIN_MEAN
    if fails:
        raise ValueError(
            f"expected PyTorch's embeddings from {tower.file}, got cosines of {parity.cosine_mean:.5f} in the mean and "
            f"{parity.cosine_min:.5f} at least over {parity.inputs} inputs: report it, with the output of "
            "`clipkernels info`"
        )
    return parity


def prove_folder(
    folder: Path, towers: Mapping[str, Tower], preprocess: Callable[[Image.Image], Tensor], has_tokenizer: bool
) -> None:
    """Open a folder as its users will, and encode images and texts.

    Raises:
        ValueError: the folder cannot be read, or its embeddings are not those of PyTorch.
    """
    runtime = Runtime(folder)
    colours = torch.randint(256, (2, 97, 131, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(image.numpy()) for image in colours]
    expected = {
        "image": encode_all(towers["image"].module, torch.stack([preprocess(image) for image in images]).float())
    }
    actual = {"image": runtime.encode_image(images)}
    if has_tokenizer:
        expected["text"] = towers["text"].expected
        actual["text"] = runtime.encode_text(list(TEXTS))
    for kind, embeddings in actual.items():
        cosine = measure_parity(torch.from_numpy(embeddings), expected[kind]).cosine_mean
        if cosine < MIN_MEAN:
            raise ValueError(
                f"expected PyTorch's embeddings from the folder, got a mean cosine of {cosine:.4f} ({kind})"
            )


def check_cosine(parity: Parity, min_cosine: float | None) -> None:
    """Raise ValueError if the first percentile of the cosine is below a limit."""
    if min_cosine is not None and parity.cosine_p1 < min_cosine:
        raise ValueError(
            f"expected a first percentile of the cosine with fp32 of at least {min_cosine}, got {parity.cosine_p1:.5f} "
            f"over {parity.inputs} images: calibrate with more images of your own, or lower min_cosine"
        )


def record_tower(tower: Tower) -> dict[str, Any]:
    """The entry of a graph in export.json."""
    file, (source, target), width = tower.file, tower.names, tower.expected.shape[1]
    record = {"file": file, "input": source, "output": target, "width": width}
    if tower.inputs.is_floating_point():
        return {**record, "size": list(tower.inputs.shape[2:])}
    dtype = str(tower.inputs.dtype).removeprefix("torch.")
    return {**record, "context_length": tower.inputs.shape[1], "dtype": dtype}
