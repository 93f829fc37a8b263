"""The files that immich reads: config.json, visual/ and textual/, with normalised embeddings.

immich gives the graphs one image as `image` and the ids of one text as `text` (int32), and takes the only output. It
reads the length of texts from config.json, the steps before the tower from visual/preprocess_cfg.json, and the token
that pads from textual/tokenizer_config.json. It cuts and pads texts itself, and joins white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGE, TEXT = "visual/model.onnx", "textual/model.onnx"
IMAGE_NAMES, TEXT_NAMES = ("image", "image_embeds"), ("text", "text_embeds")
PREPROCESS, TOKENIZER = "visual/preprocess_cfg.json", "textual/tokenizer_config.json"


def write(
    folder: Path,
    preprocess: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    context_length: int | None,
    width: int,
) -> dict[str, Any] | None:
    """Write the files beside the graphs, and return the record of the tokenizer, whose file moves to textual/.

    Args:
        folder: the folder, with the tokenizer's file.
        preprocess: the record of the preprocessing.
        tokenizer: the record of the tokenizer.
        context_length: tokens of a text.
        width: of the embeddings.
    Raises:
        ValueError: a preprocessing or a tokenizer that immich cannot run, or no tokenizer.
    """
    if tokenizer is None or context_length is None:
        raise ValueError('expected tokenizer= and a text tower with layout="immich", which searches by text, got none')
    cfg = preprocess_cfg(preprocess["steps"])
    _write_json(folder / PREPROCESS, cfg)
    text_cfg = {"context_length": context_length}
    if tokenizer["clean"] == "canonicalize":
        text_cfg["tokenizer_kwargs"] = {"clean": "canonicalize"}  # type: ignore[assignment]
    content = {"embed_dim": width, "vision_cfg": {"image_size": cfg["size"][0]}, "text_cfg": text_cfg}
    _write_json(folder / "config.json", content)
    file = folder / tokenizer["file"]
    tokens = json.loads(file.read_text(encoding="utf-8"))
    _write_json(folder / TOKENIZER, {"pad_token": pad_token(tokens, tokenizer["pad_id"])})
    target = "textual/tokenizer.json"
    file.rename(folder / target)
    return {**tokenizer, "file": target}


def preprocess_cfg(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps of a preprocessing in open_clip's form.

    Raises:
        ValueError: steps that immich does not have.
    """
    resize, *crop, _, normalize = steps
    kinds = [step["op"] for step in steps]
    modes = {("squash", 0): "squash", ("shortest", 1): "shortest"}
    mode = modes.get((resize.get("mode", ""), len(crop)))
    if (
        kinds not in (["resize", "to_float", "normalize"], ["resize", "center_crop", "to_float", "normalize"])
        or not mode
    ):
        raise ValueError(f'expected a resize, a crop and a normalisation with layout="immich", got {", ".join(kinds)}')
    sides = crop[0]["size"] if crop else resize["size"]
    if sides[0] != sides[1] or (crop and resize["size"] not in (sides[0], list(sides))):
        raise ValueError(f'expected square images that are resized to their size with layout="immich", got {sides}')
    return {
        "size": list(sides), "mode": "RGB", "mean": normalize["mean"], "std": normalize["std"],
        "interpolation": resize["interpolation"], "resize_mode": mode, "fill_color": 0,
    }  # fmt: skip


def pad_token(tokenizer: Mapping[str, Any], pad_id: int) -> str:
    """The token of an id in the content of a tokenizer.json.

    Raises:
        ValueError: no token has it.
    """
    tokens = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer["model"]["vocab"]
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], at) for at, entry in enumerate(vocabulary))
    )
    tokens |= {index: token for token, index in pairs if index == pad_id}
    if pad_id not in tokens:
        raise ValueError(f'expected a token that pads with layout="immich", got the id {pad_id} without one')
    token: str = tokens[pad_id]
    return token


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
