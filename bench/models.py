"""Towers with random weights, the methods that are timed on them, and random images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import clipkernels as ck
from bench.runners import DEVICE
from clipkernels.measure.timing import HOST
from clipkernels.testing import open_clip_tower, openai_tower, patch_ranking, timm_tower, transformers_tower

R = {"ViT-B-32": 4, "ViT-B-16": 13, "ViT-L-14": 7, "ViT-L-14-336": 16, "ViT-SO400M-14-SigLIP-384": 20}
LIBRARIES = ("open_clip", "transformers", "timm", "clip")
NAMES = "open_clip models, or transformers:CLASS (a ViT-B/16), timm:MODEL, clip:ViT-B-16"


@lru_cache(maxsize=2)
def build(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a model with random weights, a complete image tower, and a stub as text tower."""
    torch.manual_seed(0)
    library, _, kind = name.rpartition(":")
    with DEVICE:  # drawing the weights of a large tower is faster there
        if library == "transformers":
            model = transformers_tower(kind, 12)
        elif library == "timm":
            model = timm_tower(kind, None, num_classes=0)
        else:
            model = openai_tower(12) if library == "clip" else open_clip_tower(kind, None)
    return model.to(DEVICE, dtype)


def methods(name: str, model: nn.Module) -> dict[str, ck.Method | None]:
    """Return the methods to run on a model, by name; None is the host's own forward. Predictors have random weights."""
    r = R.get(name, 13 if ":" in name else 8)
    return {
        HOST: None,
        "Dense()": ck.Dense(),
        "EViT(keep=0.7)": ck.EViT(0.7),
        "EViT(keep=0.5)": ck.EViT(0.5),
        f"ToMe(r={r})": ck.ToMe(r),
        "TCA(rate=0.035)": ck.TCA(0.035),
        "TCA(rate=0.1)": ck.TCA(0.1),
        "PatchRanking(keep=0.6)": patch_ranking(model, 0.6, 3),
    }


def images(tower: Any, batch: int, dtype: torch.dtype, sets: int = 3) -> tuple[Tensor, ...]:
    """Return `sets` random image batches (B,3,S,S)."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (sets, batch, 3, *tower.image_size)
    return torch.randn(size, generator=generator, device=DEVICE).to(dtype).unbind()
