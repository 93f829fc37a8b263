"""The contents of an artefact in use: a model, its preprocessing and its tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.data import Preprocess


class Artefact(NamedTuple):
    """The contents of a folder that `ck.save` wrote.

    model: in eval mode, patched with the folder's method, in the precision that it was saved in.
    preprocess: from a PIL image to a tensor (3,S,S); None if a model of transformers was saved without one.
    tokenizer: as in `ck.Classifier`; None for a model without text, or of transformers saved without one.
    """

    model: nn.Module
    preprocess: Preprocess | None
    tokenizer: Any


def has_text(model: nn.Module) -> bool:
    """Return true if a model encodes texts."""
    try:
        find_text_encoder(model)
    except UnsupportedTower:
        return False
    return True
