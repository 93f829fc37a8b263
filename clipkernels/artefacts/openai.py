"""Checkpoints of OpenAI's clip: a state dict in safetensors, which its `build_model` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkernels.arguments import describe
from clipkernels.artefacts.contents import Artefact
from clipkernels.artefacts.header import Header, TokenizerRecord

WEIGHTS = "model.safetensors"
VOCABULARY, CONTEXT = 49408, 77
"""Of its only tokenizer, `clip.tokenize`."""


def write(
    model: Any, state: Mapping[str, Tensor], folder: Path, config: Any, tokenizer: Any, preprocess: Any
) -> TokenizerRecord | None:
    """Write a checkpoint. The sizes of the weights are its whole configuration.

    Raises:
        ValueError: a configuration.
    """
    if config is not None:
        raise ValueError(f"config must be None for a model of OpenAI's clip, which needs none, got {describe(config)}")
    save_file(dict(state), folder / WEIGHTS, {"format": "pt"})
    known = (model.vocab_size, model.context_length) == (VOCABULARY, CONTEXT)
    return TokenizerRecord("library") if tokenizer is not None or known else None


def read(folder: Path, header: Header) -> Artefact:
    """The contents of a checkpoint, in float32."""
    import clip
    from clip.clip import _transform
    from clip.model import build_model

    state = load_file(folder / WEIGHTS)
    model = build_model(dict(state)).float()  # it rounds to half precision
    model.load_state_dict(state)
    return Artefact(
        model, _transform(model.visual.input_resolution), None if header.tokenizer is None else clip.tokenize
    )
