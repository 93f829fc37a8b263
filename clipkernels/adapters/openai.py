"""OpenAI's own clip package, and clip-anytorch: its VisionTransformer runs sequence-first and pools CLS.

Its blocks are those of open_clip without layer scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.adapters.open_clip import OpenCLIPBlock, refusal
from clipkernels.adapters.parts import hooked, ratio_of, replaced


def find(visual: Any) -> OpenAITower | None:
    """The tower of a clip VisionTransformer, None for anything else."""
    needs = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "input_resolution")
    if not all(hasattr(visual, attribute) for attribute in needs) or not hasattr(visual.transformer, "resblocks"):
        return None
    return OpenAITower(visual)


class OpenAITower:
    """The parts of a clip VisionTransformer.

    Args:
        visual: the VisionTransformer.
        owner: the instance of its transformer that runs, if not its own: DataParallel runs replicas.
    """

    prefix = 1
    has_cls = True
    hands_out = pools_by_query = checkpointing = False

    def __init__(self, visual: Any, owner: Any = None) -> None:
        self.root = self.visual = visual
        self.owner = visual.transformer if owner is None else owner

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.owner.resblocks

    @property
    def tokens(self) -> int:
        return self.visual.positional_embedding.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        size: int = self.visual.input_resolution
        return size, size

    @property
    def width(self) -> int:
        return self.visual.positional_embedding.shape[1]

    @property
    def patch(self) -> int:
        return self.visual.conv1.stride[0]

    @property
    def out(self) -> int:
        return self.width if self.visual.proj is None else self.visual.proj.shape[1]

    @property
    def mlp_ratio(self) -> float:
        block: Any = self.blocks[0]
        return ratio_of(block.mlp, self.width)

    @property
    def like(self) -> Tensor:
        return self.visual.conv1.weight

    @property
    def pools_cls(self) -> bool:
        return self.visual is not None  # a transformer unpickled without its tower: who knows what will read it

    def parts(self, host: nn.Module) -> OpenCLIPBlock:
        return OpenCLIPBlock(host)

    def projections(self, host: nn.Module) -> Sequence[nn.Module]:
        return ()

    def run_block(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        return host(x.transpose(0, 1)).transpose(0, 1)

    def rope_like(self, host: nn.Module, patches: int) -> Tensor | None:
        return None

    def refusal(self, host: Any) -> str | None:
        if replaced(self.owner.resblocks) or hooked(self.owner.resblocks):
            return "its nn.Sequential carries a hook or a replaced forward, which would be skipped: remove it first"
        if getattr(host, "attn_mask", None) is not None:
            return f"expected attention without a mask, got one of shape {tuple(host.attn_mask.shape)}"
        return refusal(host)

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
