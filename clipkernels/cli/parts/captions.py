"""Captions in files beside the images, and their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from clipkernels.classifier import prompt_embeddings
from clipkernels.files import open_regular
from clipkernels.messages import reason_of

MAX_BYTES = 1 << 20


def read_captions(paths: Sequence[str], suffix: str) -> list[str]:
    """Return the caption of each image, the content of the file of the same name with another suffix, such as txt.

    Raises:
        click.UsageError: a file that is not there or no text in UTF-8, or an empty one.
    """
    captions = []
    for path in paths:
        file = Path(path).with_suffix(f".{suffix.removeprefix('.')}")
        try:
            with open_regular(file, MAX_BYTES) as stream:
                caption = " ".join(stream.read().decode("utf-8-sig").split())
        except (OSError, ValueError) as error:
            raise click.UsageError(f"expected a caption in {file}, got an error: {reason_of(error)}") from error
        if not caption:
            raise click.UsageError(f"expected a caption in {file}, got an empty file")
        captions.append(caption)
    return captions


def embed_captions(model: nn.Module, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the embeddings (n,E) of captions, and numbers (n,) that are equal for equal captions."""
    numbers: dict[str, int] = {}
    ids = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    rows = torch.cat(prompt_embeddings(model, tokenizer, {caption: [caption] for caption in numbers}))
    return rows.cpu()[ids], ids
