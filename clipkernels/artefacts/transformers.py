"""Checkpoints of transformers, as `save_pretrained` writes and `from_pretrained` reads them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipkernels.arguments import describe
from clipkernels.artefacts.contents import Artefact
from clipkernels.artefacts.header import Header, TokenizerRecord

PROCESSOR = "preprocessor_config.json"
OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def write(
    model: Any, state: Mapping[str, Tensor], folder: Path, config: Any, tokenizer: Any, preprocess: Any
) -> TokenizerRecord | None:
    """Write a checkpoint, with tokenizer and image processor if they are given; a processor holds both.

    Raises:
        ValueError: a configuration, or a tokenizer or an image processor without `save_pretrained`.
    """
    if config is not None:
        raise ValueError(f"config must be None for transformers, whose models carry their own, got {describe(config)}")
    if hasattr(tokenizer, "image_processor"):
        preprocess = tokenizer.image_processor if preprocess is None else preprocess
        tokenizer = tokenizer.tokenizer
    preprocess = getattr(preprocess, "image_processor", preprocess)
    for name, part in (("tokenizer", tokenizer), ("preprocess", preprocess)):
        if part is not None and not hasattr(part, "save_pretrained"):
            kind = "a tokenizer" if name == "tokenizer" else "an image processor"
            raise ValueError(f"{name} must be {kind} of transformers, with save_pretrained, got {describe(part)}")
    safe = "safe_serialization" in inspect.signature(model.save_pretrained).parameters  # version 5 knows nothing else
    model.save_pretrained(folder, state_dict=dict(state), **({"safe_serialization": True} if safe else {}))
    for part in (tokenizer, preprocess):
        if part is not None:
            part.save_pretrained(folder)
    return None if tokenizer is None else TokenizerRecord("library")


def read(folder: Path, header: Header) -> Artefact:
    """The contents of a checkpoint, in float32.

    Raises:
        ValueError: the header names no model class of transformers.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    cls = getattr(transformers, header.model, None) if header.model.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"expected a model class of transformers, got {header.model!r:.60} in {folder}")
    dtype = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"
    precision: dict[str, Any] = {dtype: torch.float32}
    model = cls.from_pretrained(folder, **precision, **OPTIONS)
    preprocess, tokenizer = None, None
    if PROCESSOR in header.files or "processor_config.json" in header.files:
        preprocess = partial(run_processor, AutoImageProcessor.from_pretrained(folder, **OPTIONS))
    if header.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OPTIONS)
    return Artefact(model, preprocess, tokenizer)


def run_processor(processor: Any, image: Image.Image) -> Tensor:
    """The pixels (3,S,S) that an image processor makes of an image."""
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels
