"""OpenAI's clip package, and clip-anytorch: the first form of open_clip's tower.

It runs sequence-first, pools CLS and has no layer scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipkernels.adapters.hooks import has_hooks
from clipkernels.adapters.modules import is_forward_replaced
from clipkernels.adapters.open_clip import OpenCLIPTower, unsupported_reason


def find(visual: Any) -> OpenAITower | None:
    """The tower of a clip VisionTransformer; None for anything else."""
    embedding = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
    attributes = (*embedding, "transformer", "ln_post", "input_resolution")
    if not all(hasattr(visual, attribute) for attribute in attributes) or not hasattr(visual.transformer, "resblocks"):
        return None
    if "transformer" not in visual._modules:  # a wrapper, which forwards attributes to the tower inside it
        return None
    return OpenAITower(visual)


class OpenAITower(OpenCLIPTower):
    """The adapter of a clip VisionTransformer; arguments as in `OpenCLIPTower`."""

    returns_tokens = pools_with_queries = checkpointing = False

    @property
    def image_size(self) -> tuple[int, int]:
        size: int = self.visual.input_resolution
        return size, size

    @property
    def patch(self) -> int:
        return self.visual.conv1.stride[0]

    @property
    def out(self) -> int:
        return self.width if self.visual.proj is None else self.visual.proj.shape[1]

    @property
    def pools_cls(self) -> bool:
        # The output of a transformer unpickled without its tower may be read in any way.
        return self.visual is not None

    def layout(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def unsupported_reason(self, host: Any) -> str | None:
        if is_forward_replaced(self.owner.resblocks) or has_hooks(self.owner.resblocks):
            return "its nn.Sequential carries a hook or a replaced forward, which would be skipped: remove it first"
        if getattr(host, "attn_mask", None) is not None:
            return f"expected attention without a mask, got one of shape {tuple(host.attn_mask.shape)}"
        return unsupported_reason(host)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        visual = self.visual
        patches = visual.conv1(images.type(visual.conv1.weight.dtype)).flatten(2).mT
        cls = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return visual.ln_pre(torch.cat([cls, patches], 1) + visual.positional_embedding.to(patches.dtype)), None

    def pool(self, x: Tensor) -> Tensor:
        return self.project(x[:, :1])[:, 0]

    def project(self, x: Tensor) -> Tensor:
        x = self.visual.ln_post(x)
        return x if self.visual.proj is None else x @ self.visual.proj

    def encode(self, images: Tensor) -> Tensor:
        return self.visual(images.type(self.visual.conv1.weight.dtype))

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        def forward(self: Any, x: Tensor) -> Tensor:
            return run(self, x.transpose(0, 1))[0].transpose(0, 1)

        return {"forward": forward}
