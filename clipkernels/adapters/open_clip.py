"""open_clip's VisionTransformer, with `nn.MultiheadAttention` or its own `Attention`.

Parts are found by attribute, never by version. The tower pools CLS, the average of the patches, or by learned queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from open_clip.utils import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import linear

from clipkernels import ops
from clipkernels.adapters.modules import (
    PlainLinear,
    PlainMLP,
    bypass_reason,
    is_modified,
    mlp_of,
    norm_of,
    plain_linear,
    qkv_of,
    ratio_of,
    refuse_mask,
    scale_of,
    split_heads,
)
from clipkernels.adapters.protocols import UnsupportedTower
from clipkernels.block import Branch
from clipkernels.reference import Norm


def find(visual: Any) -> OpenCLIPTower | None:
    """The tower of an open_clip VisionTransformer; None for anything else.

    Raises:
        UnsupportedTower: the model has two attentional poolers.
    """
    attributes = ("transformer", "_embeds", "_pool", "ln_post", "class_embedding", "positional_embedding")
    if not all(hasattr(visual, attribute) for attribute in attributes) or not hasattr(visual.transformer, "resblocks"):
        return None
    if "transformer" not in visual._modules:  # a wrapper, which forwards attributes to the tower inside it
        return None
    if getattr(visual, "attn_pool_contrastive", None) is not None:
        raise UnsupportedTower(
            f"expected one attentional pooler, got {type(visual).__name__} with a {visual.attn_pool_type} pair"
        )
    return OpenCLIPTower(visual)


class OpenCLIPTower:
    """The adapter of an open_clip VisionTransformer.

    Args:
        visual: the VisionTransformer.
        owner: the transformer that runs, such as a replica of DataParallel; None is the VisionTransformer's own.
    """

    prefix = 1
    attention = None

    def __init__(self, visual: Any, owner: Any = None) -> None:
        self.root = self.visual = visual
        self.owner = visual.transformer if owner is None else owner

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.owner.resblocks

    @property
    def num_tokens(self) -> int:
        return self.visual.positional_embedding.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.visual.image_size

    @property
    def width(self) -> int:
        return self.visual.positional_embedding.shape[1]

    @property
    def patch(self) -> int:
        return self.visual.patch_size[0]

    @property
    def out(self) -> int:
        return self.visual.output_dim

    @property
    def mlp_ratio(self) -> float:
        block: Any = self.blocks[0]
        return ratio_of(block.mlp, self.width)

    @property
    def like(self) -> Tensor:
        return self.visual.conv1.weight

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def pools_cls(self) -> bool:
        visual = self.visual
        if visual is None:  # a transformer unpickled without its tower, whose output may be read in any way
            return False
        return visual.attn_pool is None and visual.pool_type == "tok"

    @property
    def returns_tokens(self) -> bool:
        return self.visual is None or self.visual.output_tokens

    @property
    def checkpointing(self) -> bool:
        return self.owner.grad_checkpointing

    def parts(self, host: nn.Module) -> OpenCLIPBlock:
        return OpenCLIPBlock(host)

    def projections(self, host: nn.Module) -> Sequence[nn.Module]:
        return ()

    def run_block(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        return self.layout(host(self.layout(x)))

    def layout(self, x: Tensor) -> Tensor:
        return x if getattr(self.owner, "batch_first", True) else x.transpose(0, 1)

    def returns_tuple(self, host: nn.Module) -> bool:
        return False

    def ignores_hook(self, hook: Any) -> bool:
        return False

    def rope_like(self, host: nn.Module, patches: int) -> Tensor | None:
        return None

    def unsupported_reason(self, host: nn.Module) -> str | None:
        return unsupported_reason(host)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.visual._embeds(images), None

    def pool(self, x: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(x)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @property
    def pools_with_queries(self) -> bool:
        return self.visual.attn_pool is not None

    def project(self, x: Tensor) -> Tensor:
        x = self.visual.ln_post(x if self.visual.attn_pool is None else self.visual.attn_pool(x))
        return x if self.visual.proj is None else x @ self.visual.proj

    def encode(self, images: Tensor) -> Tensor:
        out = self.visual(images)
        return out[0] if isinstance(out, tuple) else out

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            refuse_mask(attn_mask)
            return run(self, x)[0]

        def forward_intermediates(
            self: Any,
            x: Tensor,
            attn_mask: Tensor | None = None,
            indices: int | list[int] | None = None,
            stop_early: bool = False,
        ) -> tuple[Tensor, list[Tensor]]:
            refuse_mask(attn_mask)
            take_indices, last = feature_take_indices(len(self.resblocks), indices)
            return run(self, x, take_indices=take_indices, blocks=last + 1 if stop_early else None)

        return {"forward": forward, "forward_intermediates": forward_intermediates}


def unsupported_reason(host: Any) -> str | None:
    """The reason why a block with `nn.MultiheadAttention` or open_clip's own `Attention` is not supported, or None."""
    # A wrapper may forward attributes to the module inside it, so a part counts only as a child of the block itself.
    if not all(part in host._modules for part in ("ln_1", "attn", "ln_2", "mlp")):
        return f"expected ln_1, attn, ln_2 and mlp, got {type(host).__name__}: wrap the whole model, not its blocks"
    attn: Any = host.attn
    reason = bypass_reason(host, attn, *([attn.attn_drop] if "attn_drop" in attn._modules else ()))
    if reason is not None:
        return reason
    if hasattr(attn, "base_layer"):
        wrapper = f"{type(attn).__module__.split('.')[0]}'s {type(attn).__name__}"
        return (
            f"expected attention with in_proj_weight, got {wrapper} around it: adapt c_fc and c_proj in place of attn, "
            "or call merge_and_unload() first"
        )
    if not hasattr(attn, "in_proj_weight") or not hasattr(attn, "num_heads"):
        return f"expected attention with in_proj_weight and num_heads, got {type(attn).__name__}"
    if attn.in_proj_weight is None:
        return f"expected attention with in_proj_weight and num_heads, got {type(attn).__name__}"
    if isinstance(attn, nn.MultiheadAttention):
        if type(attn).forward is not nn.MultiheadAttention.forward:
            return f"expected torch's own nn.MultiheadAttention, got the subclass {type(attn).__name__}"
        if attn.bias_k is not None or attn.add_zero_attn or attn.dropout:
            return "expected attention without bias_k, add_zero_attn and dropout"
    elif getattr(attn, "logit_scale", None) is not None:
        return "expected dot-product attention, got scaled cosine attention"
    elif attn.attn_drop.p:
        return f"expected attention without dropout, got p = {attn.attn_drop.p}"
    return None


class OpenCLIPBlock:
    """The parts of one residual block of open_clip, or of OpenAI's clip."""

    def __init__(self, host: Any) -> None:
        attn = host.attn
        self.host, self.attn = host, attn
        self.packed = (attn.in_proj_weight, attn.in_proj_bias, attn.num_heads)
        self.has_query_norm = hasattr(attn, "ln_q")

    @cached_property
    def norm1(self) -> Norm | None:
        return norm_of(self.host.ln_1)

    @cached_property
    def norm2(self) -> Norm | None:
        return norm_of(self.host.ln_2)

    @cached_property
    def _plain_projection(self) -> PlainLinear | None:
        """The attention branch, or None if a module of it must be called."""
        readable, scale = _scale(self.host, "ls_1")
        if not readable or not isinstance(self.attn, nn.MultiheadAttention):
            return None
        return plain_linear(self.attn.out_proj.weight, self.attn.out_proj.bias, scale)

    @cached_property
    def _plain_mlp(self) -> PlainMLP | None:
        """The MLP branch, or None if a module of it must be called."""
        mlp, (readable, scale) = self.host.mlp, _scale(self.host, "ls_2")
        if not readable or type(mlp) is not nn.Sequential or len(mlp) != 3 or is_modified(mlp):
            return None
        expand, act, contract = mlp
        return mlp_of(expand, act, contract, scale)

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        x = self.host.ln_1(x) if normed is None else normed
        q, k, v = qkv_of(x, *self.packed, rows)
        if self.has_query_norm:
            # Cast to v's dtype, because the norms of open_clip's own Attention may be wider than its projections.
            q, k = attn.ln_q(q).to(v.dtype), attn.ln_k(k).to(v.dtype)
        return q, k, v

    def project(self, out: Tensor, fused: bool) -> Branch:
        host, attn = self.host, self.attn
        if fused and self._plain_projection is not None:
            return self._plain_projection.branch(out.transpose(1, 2).flatten(2))
        if getattr(attn, "head_scale", None) is not None:
            out = out * attn.head_scale
        x = out.transpose(1, 2).flatten(2)
        if isinstance(attn, nn.MultiheadAttention):
            return Branch(_apply_optional(host, "ls_1", linear(x, attn.out_proj.weight, attn.out_proj.bias)))
        x = attn.out_drop(attn.out_proj(attn.ln_inner(x)))
        return Branch(_apply_optional(host, "ls_1", _apply_optional(host, "ln_attn", x)))

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        host = self.host
        x = host.ln_2(x) if normed is None else normed
        if fused and self._plain_mlp is not None:
            return self._plain_mlp.branch(x)
        return Branch(_apply_optional(host, "ls_2", host.mlp(x)))


def _scale(host: Any, name: str) -> tuple[bool, Tensor | None]:
    """True if a block's layer scale can be read, and its gamma; None for a block without one, such as OpenAI's."""
    module = getattr(host, name, None)
    return (True, None) if module is None else scale_of(module)


def _apply_optional(host: Any, name: str, x: Tensor) -> Tensor:
    """The output of a block's module on x, or x itself if the block has no such module."""
    module = getattr(host, name, None)
    return x if module is None else module(x)


class OpenCLIPResNet:
    """The adapter of a ModifiedResNet, whose attention pool has one query, the mean over positions."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    @property
    def image_size(self) -> tuple[int, int]:
        size: int = self.visual.image_size
        return size, size

    def tokens(self, images: Tensor) -> Tensor:
        visual, pool = self.visual, self.visual.attnpool
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)
        q, k, v = (split_heads(project(x), 1, pool.num_heads)[0] for project in (pool.q_proj, pool.k_proj, pool.v_proj))
        out, _ = ops.attention(q, k, v)
        return pool.c_proj(out.transpose(1, 2).flatten(2))
