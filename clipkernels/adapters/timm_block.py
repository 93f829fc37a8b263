"""The parts of timm's blocks: Block and EvaBlock, and their post-norm variants."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from timm.layers import Mlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from clipkernels.adapters.modules import (
    PlainLinear,
    PlainMLP,
    is_linear,
    is_modified,
    is_noop,
    linear_of,
    mlp_of,
    norm_of,
    qkv_of,
    scale_of,
    split_heads,
)
from clipkernels.adapters.packing import separate_qkv
from clipkernels.block import Branch
from clipkernels.reference import Norm


def separate_projections(attn: Any) -> Sequence[nn.Module]:
    """The separate query, key and value projections of an attention; empty if it has one projection."""
    return (attn.q_proj, attn.k_proj, attn.v_proj) if getattr(attn, "qkv", None) is None else ()


class TimmBlock:
    """The parts of one block. A post-norm block applies its norms to the outputs of attention and MLP."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.post = isinstance(host, (ResPostBlock, EvaBlockPostNorm))

    @cached_property
    def norm1(self) -> Norm | None:
        return None if self.post else norm_of(self.host.norm1)

    @cached_property
    def norm2(self) -> Norm | None:
        return None if self.post else norm_of(self.host.norm2)

    @cached_property
    def _plain_projection(self) -> PlainLinear | None:
        """The attention branch, or None if a module of it must be called."""
        attn, (readable, scale) = self.host.attn, self._scale(1)
        return linear_of(attn.proj, scale) if readable and is_noop(attn.proj_drop) else None

    @cached_property
    def _plain_mlp(self) -> PlainMLP | None:
        """The MLP branch, or None if a module of it must be called."""
        mlp, (readable, scale) = self.host.mlp, self._scale(2)
        if not readable or type(mlp) is not Mlp or is_modified(mlp):
            return None
        if not all(is_noop(module) for module in (mlp.drop1, mlp.norm, mlp.drop2)):
            return None
        return mlp_of(mlp.fc1, mlp.act, mlp.fc2, scale)

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.host.attn
        if not self.post:
            x = self.host.norm1(x) if normed is None else normed
        q, k, v = _project_qkv(attn, x, rows)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            # Leading rows are not patches, so they have no position.
            q, k = (q if rows is not None else _rotate(q, rope, attn)).type_as(v), _rotate(k, rope, attn).type_as(v)
        return q, k, v

    def project(self, out: Tensor, fused: bool) -> Branch:
        attn = self.host.attn
        x = attn.norm(out.transpose(1, 2).flatten(2))
        if fused and self._plain_projection is not None:
            return self._plain_projection.branch(x)
        return self._branch(1, attn.proj_drop(attn.proj(x)))

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        host = self.host
        if not self.post:
            x = host.norm2(x) if normed is None else normed
        if fused and self._plain_mlp is not None:
            return self._plain_mlp.branch(x)
        return self._branch(2, host.mlp(x))

    def _branch(self, half: int, x: Tensor) -> Branch:
        """Branch 1 (attention) or 2 (MLP) of its last module's output: layer scale or post-norm, stochastic depth."""
        host = self.host
        if self.post:
            x = (host.norm1 if half == 1 else host.norm2)(x)
        elif hasattr(host, f"ls{half}"):
            x = getattr(host, f"ls{half}")(x)
        elif getattr(host, f"gamma_{half}") is not None:
            x = x * getattr(host, f"gamma_{half}")
        return Branch(getattr(host, f"drop_path{half}")(x))

    def _scale(self, half: int) -> tuple[bool, Tensor | None]:
        """True if nothing but a layer scale follows branch 1 or 2, and its gamma or None."""
        host = self.host
        if self.post or not is_noop(getattr(host, f"drop_path{half}")):
            return False, None
        scale = getattr(host, f"ls{half}", None)
        return (True, getattr(host, f"gamma_{half}", None)) if scale is None else scale_of(scale)


def _project_qkv(attn: Any, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,H,rows or N,D), k and v (B,H,N,D) of x (B,N,C), from one projection or three."""
    if attn.qkv is not None:
        separate = getattr(attn, "q_bias", None) is not None
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if separate else None
        if is_linear(attn.qkv):
            return qkv_of(x, attn.qkv.weight, attn.qkv.bias if bias is None else bias, attn.num_heads, rows)
        # The weight and bias of a replaced projection may be anything: methods where it is quantized.
        packed_qkv = attn.qkv(x) if bias is None else attn.qkv(x) + bias
        q, k, v = split_heads(packed_qkv, 3, attn.num_heads)
        return q if rows is None else q[:, :, :rows], k, v
    return separate_qkv(separate_projections(attn), x, attn.num_heads, rows)


def _rotate(x: Tensor, rope: Tensor, attn: Any) -> Tensor:
    """x (B,H,N,D) with its last P tokens, the patches, rotated by the rotary table (…,P,2·D)."""
    prefix = x.shape[2] - rope.shape[-2]
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}  # old timm has no such layout
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, **half)
    return torch.cat([x[:, :, :prefix], rotated], 2)
