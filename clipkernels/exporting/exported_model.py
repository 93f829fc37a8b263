"""Exported folders in the place of a model in PyTorch, for `ck.Classifier`, `ck.embed` and `ck.search`."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.adapters import Exported
from clipkernels.data import Preprocess
from clipkernels.runtime import Runtime
from clipkernels.runtime.preprocessing import Step, preprocess


class ExportedModel(nn.Module):
    """The towers of an exported folder, computed by its runtime on the CPU, without gradients.

    Embeddings come back on the device and in the dtype of the images. Copies open the folder again.

    Args:
        runtime: the folder.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        info = runtime.info
        self.runtime, self.context_length = runtime, (info["text"] or {}).get("context_length")
        plan, (height, width) = info["plan"], info["image"]["size"]
        self.exported = Exported(
            image_size=(height, width), runtime=f"{info['runtime']}, {info['precision']}", method=info["method"],
            tokens=tuple(plan["tokens"]) if plan else (), tower=info["tower"], text_tower=info["text_tower"],
        )  # fmt: skip
        self.visual = _Visual((height, width))
        # A model has a weight, whose device and dtype are those of its images.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        if runtime.logit_scale is not None:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(runtime.logit_scale)), requires_grad=False)
        if runtime.logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(runtime.logit_bias), requires_grad=False)
        if info["text"] is not None:
            self.encode_text = partial(_encode_ids, runtime)
        self.eval()

    @torch.compiler.disable
    def encode_image(self, images: Tensor) -> Tensor:
        """The embeddings (B,E) of preprocessed images (B,3,S,S)."""
        embeddings = self.runtime.encode_image(images.detach().float().cpu().numpy(), batch_size=max(len(images), 1))
        return torch.from_numpy(embeddings).to(images)

    def extra_repr(self) -> str:
        return repr(self.runtime)


class _Visual(nn.Module):
    """The size of the images, where `ck.Classifier` reads it."""

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size


class Contents(NamedTuple):
    """An exported folder as a model, its preprocessing, and its tokenizer, None for a folder without one."""

    model: ExportedModel
    preprocess: Preprocess
    tokenizer: Any


def load_exported(folder: str | os.PathLike[str]) -> Contents:
    """The contents of an exported folder; its runtime has the threads of PyTorch.

    Raises:
        ValueError, ImportError, OSError: as in `clipkernels.runtime.Runtime`.
    """
    runtime = Runtime(folder, threads=torch.get_num_threads())
    tokenizer = None if runtime.info["tokenizer"] is None else partial(_tokenize, runtime)
    return Contents(ExportedModel(runtime), partial(_preprocess, runtime.info["preprocess"]["steps"]), tokenizer)


def _encode_ids(runtime: Runtime, ids: Tensor) -> Tensor:
    """The embeddings (B,E) of token ids (B,L)."""
    return torch.from_numpy(runtime.encode_ids(ids.cpu().numpy())).to(ids.device)


def _tokenize(runtime: Runtime, texts: list[str]) -> Tensor:
    """The token ids (n,L) int64 of n texts."""
    return torch.from_numpy(runtime.tokenize(texts))


def _preprocess(steps: list[Step], image: Image.Image) -> Tensor:
    """The pixels (3,S,S) of an image."""
    return torch.from_numpy(preprocess(image, steps))
