"""Checkpoints of open_clip: open_clip_config.json and safetensors, which `local-dir:` loads.

A model of open_clip carries no configuration, so the caller gives it, by name or as a dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipkernels.arguments import describe
from clipkernels.artefacts import byte_tokenizer
from clipkernels.artefacts.contents import Artefact
from clipkernels.artefacts.header import Header, TokenizerRecord
from clipkernels.data.tokenizer import ByteTokenizer
from clipkernels.messages import list_names

WEIGHTS, CONFIG, BUNDLED = "open_clip_model.safetensors", "open_clip_config.json", "bundled"
LOCAL_TOKENIZER = "local"
"""The name of a tokenizer in a configuration whose files are in the folder. open_clip then reads no other place."""
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color", "mode", "size")


def write(
    model: Any, state: Mapping[str, Tensor], folder: Path, config: Any, tokenizer: Any, preprocess: Any
) -> TokenizerRecord:
    """Write a checkpoint.

    Raises:
        ValueError: no configuration, or a tokenizer that the folder cannot hold.
    """
    content = _configuration(model, config)
    if tokenizer is None and content["model_cfg"] == _bundled()["model_cfg"]:
        tokenizer = ByteTokenizer(content["model_cfg"]["text_cfg"]["context_length"])
    record = _write_tokenizer(content["model_cfg"].get("text_cfg", {}), tokenizer, folder)
    own = getattr(model.visual, "preprocess_cfg", None)
    chosen = preprocess if isinstance(preprocess, Mapping) else own or content.get("preprocess_cfg", {})
    if unknown := set(chosen) - set(PREPROCESS_KEYS):
        raise ValueError(f"preprocess must be a dict of {', '.join(PREPROCESS_KEYS)}, got {list_names(unknown)}")
    content["preprocess_cfg"] = dict(chosen)
    save_file(dict(state), folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return record


def read(folder: Path, header: Header) -> Artefact:
    """The contents of a checkpoint, in float32."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name, low = f"local-dir:{folder.absolute()}", "bf16" if header.precision == "bfloat16" else "fp16"
    model = open_clip.create_model(name, precision=low if header.fp32_norms else "fp32", pretrained_text=False)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    if header.fp32_norms:  # low precision chooses the norms; the weights may have others
        model.float().load_state_dict(load_file(folder / WEIGHTS))
    record = header.tokenizer
    if record is not None and record.kind == "bytes":
        return Artefact(model, preprocess, ByteTokenizer(record.context_length or 2))
    return Artefact(model, preprocess, None if record is None else open_clip.get_tokenizer(name))


def has_fp32_norms(model: nn.Module) -> bool:
    """Return true if norms of a model compute in float32 whatever its precision is."""
    return any(type(module).__name__ == "LayerNormFp32" for module in model.modules())


def _configuration(model: nn.Module, config: Any) -> dict[str, Any]:
    """A configuration as open_clip_config.json has it, of which at least model_cfg is there."""
    import open_clip

    if config is None and _has_shapes_of_bundled(model):
        config = BUNDLED
    if config is None:
        raise ValueError(
            "expected config, open_clip's name of the model or its configuration as a dict, because open_clip's models "
            "carry none, got None"
        )
    if isinstance(config, Mapping):
        content = deepcopy(dict(config)) if "model_cfg" in config else {"model_cfg": deepcopy(dict(config))}
    elif config == BUNDLED:
        content = _bundled()
    elif isinstance(config, str) and open_clip.get_model_config(config) is not None:
        content = {"model_cfg": open_clip.get_model_config(config)}
    else:
        near = ", ".join(get_close_matches(str(config), open_clip.list_models(), 3)) or "ViT-B-32, …"
        raise ValueError(f"config must be a dict or one of open_clip's models ({near}), got {describe(config)}")
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in content["model_cfg"]]
    if missing:
        raise ValueError(f"config must have embed_dim, vision_cfg and text_cfg, got none of {', '.join(missing)}")
    try:  # what JSON cannot hold is refused, and tuples become lists as they will be read
        normalized: dict[str, Any] = json.loads(json.dumps(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be a dict that JSON can hold, got one with: {error}") from error
    return normalized


def _write_tokenizer(text: dict[str, Any], tokenizer: Any, folder: Path) -> TokenizerRecord:
    """Write a tokenizer's files, name it in the configuration `text`, and return its record."""
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(tokenizer, ByteTokenizer):
        # Without a name open_clip would take its own BPE, whose ids mean nothing to the model.
        text["hf_tokenizer_name"] = LOCAL_TOKENIZER
        byte_tokenizer.write(folder, tokenizer.context_length)
        return TokenizerRecord("bytes", tokenizer.context_length)
    if hasattr(tokenizer, "save_pretrained"):
        text["hf_tokenizer_name"] = LOCAL_TOKENIZER
        tokenizer.save_pretrained(str(folder))
    elif text.get("hf_tokenizer_name"):
        raise ValueError(
            f"expected tokenizer=, because the configuration names {text['hf_tokenizer_name']}, which is no part of "
            f"the model, got {describe(tokenizer)}: pass open_clip.get_tokenizer(…)"
        )
    elif tokenizer is None and text.get("vocab_size", 49408) != len(SimpleTokenizer().encoder):
        raise ValueError(
            f"expected tokenizer=, because the text tower has {text['vocab_size']} ids, not those of open_clip's "
            "BPE, got None"
        )
    return TokenizerRecord("library")


def _bundled() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files("clipkernels.data").joinpath("tiny_clip.json").read_text())
    return content


def _has_shapes_of_bundled(model: nn.Module) -> bool:
    with safe_open(str(files("clipkernels.data").joinpath("tiny_clip.safetensors")), "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
