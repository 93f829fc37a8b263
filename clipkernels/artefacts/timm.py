"""Checkpoints of timm: config.json and safetensors, which `create_model("local-dir:…", pretrained=True)` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkernels.arguments import describe
from clipkernels.artefacts.contents import Artefact
from clipkernels.artefacts.header import Header

WEIGHTS = "model.safetensors"


def write(model: Any, state: Mapping[str, Tensor], folder: Path, config: Any, tokenizer: Any, preprocess: Any) -> None:
    """Write a checkpoint; `config` holds arguments of `create_model` that the model does not carry.

    Raises:
        ValueError: a tokenizer, or a configuration that is no mapping.
    """
    from timm.models._hub import save_config_for_hf

    if tokenizer is not None:
        raise ValueError(f"tokenizer must be None for timm, which has no text towers, got {describe(tokenizer)}")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config must be a dict of arguments of timm.create_model, got {describe(config)}")
    model_config = {"pretrained_cfg": dict(preprocess)} if isinstance(preprocess, Mapping) else None
    file: Any = folder / "config.json"  # a path, which timm before 1.0.31 needs against its annotation
    save_config_for_hf(model, file, model_config, None if config is None else dict(config))
    save_file(dict(state), folder / WEIGHTS, {"format": "pt"})


def read(folder: Path, header: Header) -> Artefact:
    """The contents of a checkpoint, in float32."""
    import timm
    from timm.models._hub import load_model_config_from_path

    # Not by "local-dir:…", because timm before 1.0.31 loses the arguments there and takes safetensors for pickles.
    preprocess, name, arguments = load_model_config_from_path(folder)
    model = timm.create_model(name, pretrained_cfg=preprocess, **(arguments or {}))
    model.load_state_dict(load_file(folder / WEIGHTS))
    data = timm.data.resolve_model_data_config(model)
    return Artefact(model.float(), timm.data.create_transform(**data, is_training=False), None)
