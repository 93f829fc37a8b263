"""timm's VisionTransformer and Eva, alone or inside open_clip's TimmModel.

    VisionTransformer  SigLIP, SigLIP2, MobileCLIP-B and -L, ViTamin's transformer stage, DeiT, DINOv2, …
    Eva                EVA01, EVA02, PE-Core: rotary embeddings, post-norm blocks, SwiGLU

The trunk itself is the owner, because its own loops bypass a container of blocks when they recompute activations or
collect states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention, AttentionRope
from timm.models._features import feature_take_indices
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from clipkernels.adapters.hooks import has_hooks
from clipkernels.adapters.modules import (
    bypass_reason,
    is_forward_replaced,
    ratio_of,
    refuse_mask,
)
from clipkernels.adapters.protocols import UnsupportedTower
from clipkernels.adapters.timm_block import TimmBlock, separate_projections

FORWARDS = (Block.forward, EvaBlock.forward, ResPostBlock.forward, EvaBlockPostNorm.forward)


def find(visual: Any) -> TimmTower | None:
    """The tower of a TimmModel or of a timm model; None unless it is a VisionTransformer or an Eva.

    Raises:
        UnsupportedTower: a subclass has another forward, or each block has its own rotary embedding.
    """
    trunk = getattr(visual, "trunk", visual)
    if not isinstance(trunk, (VisionTransformer, Eva)):
        return None
    if trunk is not visual and "trunk" not in visual._modules:  # a wrapper, which forwards attributes to a TimmModel
        return None
    kind: Any = getattr(type(trunk), "_host", type(trunk))
    base: Any = VisionTransformer if isinstance(trunk, VisionTransformer) else Eva
    for name in ("forward", "forward_features", "forward_intermediates"):
        if getattr(kind, name) is not getattr(base, name):
            raise UnsupportedTower(f"expected timm's own {base.__name__}.{name}, got that of {kind.__name__}")
    if getattr(trunk, "rope_mixed", False):
        raise UnsupportedTower(f"expected rotary embeddings that all blocks share, got {kind.__name__} with one each")
    return TimmTower(visual)


class TimmTower:
    """The adapter of a timm trunk.

    Args:
        visual: the trunk, or the TimmModel around it.
        owner: the trunk that runs, or None for that of `visual`; DataParallel runs replicas.
    """

    attention = None

    def __init__(self, visual: Any, owner: Any = None) -> None:
        self.root = visual
        self.owner = getattr(visual, "trunk", visual) if owner is None else owner
        self.head = visual.head if hasattr(visual, "trunk") else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.owner.blocks

    @property
    def prefix(self) -> int:
        return self.owner.num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        return self.owner.patch_embed.num_patches + self.prefix

    @property
    def image_size(self) -> tuple[int, int]:
        return self.owner.patch_embed.img_size

    @property
    def width(self) -> int:
        return self.owner.embed_dim

    @property
    def patch(self) -> int:
        height, _ = self.image_size
        return height // self.owner.patch_embed.grid_size[0]

    @property
    def out(self) -> int:
        for module in (*reversed(list((self.head or nn.Identity()).modules())), self.owner.head):
            if hasattr(module, "out_features"):
                return module.out_features
        return self.width

    @property
    def mlp_ratio(self) -> float:
        return ratio_of(self.owner.blocks[0].mlp, self.width)

    @property
    def like(self) -> Tensor:
        return next(self.owner.blocks[0].parameters())

    @property
    def has_cls(self) -> bool:
        return self.owner.cls_token is not None

    @property
    def pools_cls(self) -> bool:
        return self.owner.attn_pool is None and self.owner.global_pool == "token"

    @property
    def returns_tokens(self) -> bool:
        return self.owner.attn_pool is None and not self.owner.global_pool

    @property
    def pools_with_queries(self) -> bool:
        return False

    @property
    def checkpointing(self) -> bool:
        return self.owner.grad_checkpointing

    def parts(self, host: nn.Module) -> TimmBlock:
        return TimmBlock(host)

    def projections(self, host: Any) -> Sequence[nn.Module]:
        return separate_projections(host.attn)

    def run_block(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        return host(x) if rope is None else host(x, rope=rope)

    def layout(self, x: Tensor) -> Tensor:
        return x

    def returns_tuple(self, host: nn.Module) -> bool:
        return False

    def ignores_hook(self, hook: Any) -> bool:
        return False

    def rope_like(self, host: Any, patches: int) -> Tensor | None:
        if getattr(self.owner, "rope", None) is None:
            return None
        width = self.width // host.attn.num_heads
        angles = torch.linspace(0, 3, patches * width, device=self.like.device).view(patches, width)
        return torch.cat([angles.sin(), angles.cos()], -1)

    def unsupported_reason(self, host: Any) -> str | None:
        blocks = self.owner.blocks
        if is_forward_replaced(blocks) or has_hooks(blocks):
            return f"its {type(blocks).__name__} carries a hook or a replaced forward, which would be skipped"
        if not any(type(host).forward is forward for forward in FORWARDS):
            return f"expected the forward of a Block or an EvaBlock, got that of {type(host).__name__}"
        attn = host.attn
        reason = bypass_reason(host, attn, attn.attn_drop)
        if reason is not None:
            return reason
        if not isinstance(attn, (Attention, AttentionRope, EvaAttention)):
            return f"expected Attention, AttentionRope or EvaAttention, got {type(attn).__name__}"
        if getattr(attn, "gate", None) is not None:
            return "expected attention without a gate"
        if getattr(attn, "num_kv_groups", 1) != 1:
            return f"expected as many key as query heads, got {attn.num_kv_heads} for {attn.num_heads}"
        return f"expected attention without dropout, got p = {attn.attn_drop.p}" if attn.attn_drop.p else None

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return _embed(self.owner, images)

    def pool(self, x: Tensor) -> Tensor:
        return self._out(self.owner.forward_head(self.owner.norm(x)))

    def project(self, x: Tensor) -> Tensor:
        # The pool gets one token at a time.
        trunk, x = self.owner, self.owner.norm(x)
        if isinstance(trunk.attn_pool, AttentionPoolLatent):
            x = trunk.attn_pool(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        return self._out(trunk.head(trunk.head_drop(trunk.fc_norm(x))))

    def encode(self, images: Tensor) -> Tensor:
        return self.root(images)

    def _out(self, x: Tensor) -> Tensor:
        return x if self.head is None else self.head(x)

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            refuse_mask(attn_mask, is_causal)
            x, rope = _embed(self, x)
            return self.forward_head(self.norm(run(self, x, rope)[0]))

        def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            refuse_mask(attn_mask, is_causal)
            x, rope = _embed(self, x)
            return self.norm(run(self, x, rope, patches=True)[0])

        def forward_intermediates(
            self: Any,
            x: Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
        ) -> Any:
            refuse_mask(attn_mask, is_causal)
            if output_fmt not in ("NCHW", "NLC"):
                raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}')
            take_indices, last = feature_take_indices(len(self.blocks), indices)
            size, prefix = x.shape[-2:], self.num_prefix_tokens
            x, rope = _embed(self, x)
            blocks = last + 1 if stop_early else None
            x, intermediates = run(self, x, rope, take_indices=take_indices, blocks=blocks, patches=True)
            intermediates = [self.norm(y) if norm else y for y in intermediates]
            states = [y[:, prefix:] for y in intermediates]
            if output_fmt == "NCHW":
                grid = self.patch_embed.dynamic_feat_size(size)
                states = [y.mT.unflatten(2, grid).contiguous() for y in states]
            leading = [y[:, :prefix] for y in intermediates] if return_prefix_tokens and prefix else None
            if output_dict:
                output = {"image_intermediates": states, "image_intermediates_prefix": leading}
                output["image_features"] = None if intermediates_only else self.norm(x)
                return {name: value for name, value in output.items() if value is not None}
            outputs = states if leading is None else list(zip(states, leading))  # noqa: B905  # old dynamo
            return outputs if intermediates_only else (self.norm(x), outputs)

        return {
            "forward": forward,
            "forward_features": forward_features,
            "forward_intermediates": forward_intermediates,
        }


def _embed(trunk: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The tokens (B,N,C) entering the first block, and the rotary table (…,P,2·D) of the patches, or None.

    Raises:
        ValueError: the images have no batch axis, or another size than a tower of fixed size takes.
    """
    height, width = trunk.patch_embed.img_size or ("S", "S")
    fixed = getattr(trunk.patch_embed, "strict_img_size", False)
    if images.ndim != 4 or (fixed and tuple(images.shape[2:]) != (height, width)):
        raise ValueError(f"images must be (B,3,{height},{width}), got ({','.join(map(str, images.shape))})")
    embedded = trunk._pos_embed(trunk.patch_embed(images))
    # In training, Eva itself drops patches together with their rotary embeddings. VisionTransformer has none of these.
    x, rope = embedded if isinstance(embedded, tuple) else (trunk.patch_drop(embedded), None)
    return trunk.norm_pre(x), rope
