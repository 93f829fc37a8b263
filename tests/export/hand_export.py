"""The bundled model exported to ONNX by hand, for tests of the runtime alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clipkernels as ck
from clipkernels.exporting.preprocess_steps import preprocess_record
from clipkernels.exporting.tokenizer_files import tokenizer_record
from clipkernels.files import hash_of
from clipkernels.fingerprint import fingerprint
from clipkernels.runtime.copying import copy_into
from clipkernels.runtime.manifest import FORMAT, digest_of
from clipkernels.tower import make_plan


def pictures() -> list[Image.Image]:
    """Three images of noise."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40 + i, 50, 3)).astype(np.uint8)) for i in range(3)]


class Call(nn.Module):
    """A module that calls a method of a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.name)(batch)


def write_export(folder: Path, text: bool = True) -> Path:
    """Write an exported folder of the bundled model in fp32, patched with EViT, and return it."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder.mkdir(parents=True)
    model, preprocess, tokenizer = ck.bundled()
    ck.patch(model, ck.EViT(keep=0.7))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    ids = tokenizer(["a cat", "two dogs"])
    graphs: dict[str, tuple[str, torch.Tensor, tuple[str, str]]] = {
        "image": ("encode_image", torch.randn(2, 3, 32, 32), ("pixel_values", "image_embeds"))
    }
    if text:
        graphs["text"] = ("encode_text", ids, ("input_ids", "text_embeds"))
    content: dict[str, Any] = {"format": FORMAT, "runtime": "onnx", "precision": "fp32", "text": None}
    for name, (method, example, (source, target)) in graphs.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Call(model, method).eval(), (example,), dynamo=True, opset_version=20, dynamic_shapes=shapes,
                verbose=False, input_names=[source], output_names=[target],
            )  # fmt: skip
        assert program is not None
        program.save(str(folder / f"{name}.onnx"))
        content[name] = {"file": f"{name}.onnx", "input": source, "output": target, "width": 128}
    content["image"]["size"] = [32, 32]
    if text:
        content["text"] |= {"context_length": ids.shape[1], "dtype": "int64"}
    content |= {
        "preprocess": preprocess_record(preprocess),
        "tokenizer": tokenizer_record(tokenizer, None, folder) if text else None,
        "logit_scale": float(model.logit_scale.detach().exp()) if text else None,
        "logit_bias": None,
        "name": {"library": "open_clip", "model": "CLIP"},
        "method": str(ck.method_of(model)),
        "plan": {"tokens": list(make_plan(ck.EViT(keep=0.7), ck.tower_of(model), 65).tokens)},
        "tower": fingerprint(model),
        "text_tower": fingerprint(model, "text") if text else None,
    }
    copy_into(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sign(folder, {**content, "files": {name: hash_of(folder / name) for name in files}})
    return folder


def sign(folder: Path, content: dict[str, Any]) -> None:
    """Write export.json."""
    text = json.dumps({**content, "sha256": digest_of(content)}, ensure_ascii=False)
    (folder / "export.json").write_text(text, encoding="utf-8")
