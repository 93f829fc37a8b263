"""open_clip's VisionTransformer, with `nn.MultiheadAttention` or its own `Attention`.

Parts are read by attribute, never by version. The tower pools CLS, the average of the patches, or by learned queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32, LayerScale, QuickGELU
from open_clip.utils import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import linear

from clipkernels import ops
from clipkernels.adapters import UnsupportedTower
from clipkernels.block import Branch
from clipkernels.reference import Act, Norm


def find(model: nn.Module) -> OpenCLIPTower:
    """The tower of an open_clip model, or of its `visual` itself.

    Raises:
        UnsupportedTower: naming what was found instead.
    """
    visual: Any = getattr(model, "visual", model)
    name = type(visual).__name__
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        raise UnsupportedTower(
            f"expected an open_clip VisionTransformer, got {name} around timm's {type(trunk).__name__}"
        )
    needs = ("transformer", "_embeds", "_pool", "ln_post", "class_embedding", "positional_embedding")
    if not all(hasattr(visual, attribute) for attribute in needs) or not hasattr(visual.transformer, "resblocks"):
        raise UnsupportedTower(f"expected an open_clip VisionTransformer, got {name}")
    if getattr(visual, "attn_pool_contrastive", None) is not None:
        raise UnsupportedTower(f"expected one attentional pooler, got {name} with a {visual.attn_pool_type} pair")
    return OpenCLIPTower(visual)


def find_resnet(model: nn.Module) -> OpenCLIPResNet | None:
    """The tower of an open_clip model, or of its `visual` itself, if it is a ModifiedResNet with an attention pool."""
    visual: Any = getattr(model, "visual", model)
    pool = getattr(visual, "attnpool", None)
    return OpenCLIPResNet(visual) if hasattr(visual, "layer4") and hasattr(pool, "c_proj") else None


class OpenCLIPTower:
    """The parts of an open_clip VisionTransformer.

    Args:
        visual: the VisionTransformer.
        owner: the instance of its transformer that runs, if not its own: DataParallel runs replicas.
    """

    prefix = 1

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
        mlp: Any = self.blocks[0].mlp
        return mlp.c_fc.out_features / self.width

    @property
    def like(self) -> Tensor:
        return self.visual.conv1.weight

    @property
    def cls_only(self) -> bool:
        visual = self.visual
        if visual is None:  # a transformer unpickled without its tower: who knows what will read it
            return False
        return visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens

    @property
    def checkpointing(self) -> bool:
        return self.owner.grad_checkpointing

    def parts(self, host: nn.Module) -> OpenCLIPBlock:
        return OpenCLIPBlock(host)

    def run_block(self, host: Any, x: Tensor) -> Tensor:
        if getattr(self.owner, "batch_first", True):
            return host(x)
        return host(x.transpose(0, 1)).transpose(0, 1)

    def refusal(self, host: Any) -> str | None:
        # A wrapper may pass on what it lacks, so a part counts only where the module itself holds it.
        if not all(part in host._modules for part in ("ln_1", "attn", "ln_2", "mlp")):
            return f"expected ln_1, attn, ln_2 and mlp, got {type(host).__name__}"
        attn: Any = host.attn
        for module in (host, attn):
            if getattr(module, "_compiled_call_impl", None) is not None:
                return f"its {type(module).__name__} is compiled by itself: compile the whole tower instead"
            if _replaced(module):
                return f"the forward of its {type(module).__name__} was replaced: patch before that"
            if _hooked(module, "_"):
                return f"its {type(module).__name__} carries a hook, which would be skipped: remove it first"
        weight = getattr(attn, "in_proj_weight", None)
        if weight is None or not hasattr(attn, "num_heads") or hasattr(attn, "base_layer"):
            return f"expected attention with in_proj_weight and num_heads, got {type(attn).__name__}"
        if hasattr(weight, "device_mesh"):
            return f"its {type(attn).__name__} has sharded parameters: patch before sharding"
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

    def embed(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def pool(self, x: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(x)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @property
    def pools_by_query(self) -> bool:
        return self.visual.attn_pool is not None

    def project(self, x: Tensor) -> Tensor:
        x = self.visual.ln_post(x if self.visual.attn_pool is None else self.visual.attn_pool(x))
        return x if self.visual.proj is None else x @ self.visual.proj

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            _no_mask(attn_mask)
            return run(self, x)[0]

        def forward_intermediates(
            self: Any,
            x: Tensor,
            attn_mask: Tensor | None = None,
            indices: int | list[int] | None = None,
            stop_early: bool = False,
        ) -> tuple[Tensor, list[Tensor]]:
            _no_mask(attn_mask)
            take, last = feature_take_indices(len(self.resblocks), indices)
            return run(self, x, take, last + 1 if stop_early else None)

        return {"forward": forward, "forward_intermediates": forward_intermediates}


def _no_mask(attn_mask: Tensor | None) -> None:
    if attn_mask is not None:
        raise ValueError(f"a patched tower takes no attn_mask, got one of shape {tuple(attn_mask.shape)}")


class OpenCLIPBlock:
    """The parts of one residual block."""

    def __init__(self, host: Any) -> None:
        self.host = host

    @property
    def norm1(self) -> Norm | None:
        return _norm(self.host.ln_1)

    @property
    def norm2(self) -> Norm | None:
        return _norm(self.host.ln_2)

    def qkv(self, x: Tensor, normed: Tensor | None, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.host.attn
        x = self.host.ln_1(x) if normed is None else normed
        weight, bias, width = attn.in_proj_weight, attn.in_proj_bias, x.shape[-1]
        if rows is None:
            q, k, v = _heads(linear(x, weight, bias), 3, attn.num_heads)
        else:
            (q,) = _heads(
                linear(x[:, :rows], weight[:width], None if bias is None else bias[:width]), 1, attn.num_heads
            )
            k, v = _heads(linear(x, weight[width:], None if bias is None else bias[width:]), 2, attn.num_heads)
        if hasattr(attn, "ln_q"):
            # v's dtype: the norms of open_clip's own Attention may be wider than its projections.
            q, k = attn.ln_q(q).to(v.dtype), attn.ln_k(k).to(v.dtype)
        return q, k, v

    def project(self, out: Tensor, fused: bool) -> Branch:
        host, attn = self.host, self.host.attn
        if getattr(attn, "head_scale", None) is not None:
            out = out * attn.head_scale
        x = out.transpose(1, 2).flatten(2)
        if not isinstance(attn, nn.MultiheadAttention):
            x = attn.out_drop(attn.out_proj(attn.ln_inner(x)))
            return Branch(_optional(host, "ls_1", _optional(host, "ln_attn", x)))
        weight, bias = attn.out_proj.weight, attn.out_proj.bias
        if fused and _scalable(host.ls_1):
            return Branch(linear(x, weight), bias, _scale(host.ls_1))
        return Branch(host.ls_1(linear(x, weight, bias)))

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        host = self.host
        x = host.ln_2(x) if normed is None else normed
        act = _activation(host.mlp) if fused and _scalable(host.ls_2) else None
        if act is None:
            return Branch(_optional(host, "ls_2", host.mlp(x)))
        expand, _, contract = host.mlp
        hidden = ops.bias_act(linear(x, expand.weight), expand.bias, act)
        return Branch(linear(hidden, contract.weight), contract.bias, _scale(host.ls_2))


def _norm(module: nn.Module) -> Norm | None:
    """(weight, bias, eps) of a LayerNorm that is nothing else, or None."""
    if type(module) not in (nn.LayerNorm, LayerNorm, LayerNormFp32) or _watched(module):
        return None
    norm: Any = module
    return None if norm.weight is None or norm.bias is None else (norm.weight, norm.bias, norm.eps)


def _activation(mlp: nn.Module) -> Act | None:
    """The activation between two plain projections, or None where the modules must be called."""
    modules = list(mlp.children())
    if type(mlp) is not nn.Sequential or len(modules) != 3 or any(map(_watched, (mlp, *modules))):
        return None
    expand, act, contract = modules
    if type(expand) is not nn.Linear or type(contract) is not nn.Linear:
        return None
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return "quick_gelu" if type(act) is QuickGELU else None


def _scalable(module: nn.Module) -> bool:
    """Whether a layer scale is one that `_scale` can stand for."""
    return type(module) in (nn.Identity, LayerScale) and not _watched(module)


def _scale(module: Any) -> Tensor | None:
    return module.gamma if type(module) is LayerScale else None


def _watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    return _replaced(module) or _hooked(module, "_") or _hooked(nn.modules.module, "_global_")


def _replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def _hooked(holder: Any, start: str) -> bool:
    """Whether a module, or torch for all modules, holds hooks in attributes whose names start so."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(holder, start + kind) for kind in kinds)


def _heads(packed: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    """`parts` views (B,H,N,D) of a packed projection (B,N,parts·C)."""
    return packed.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _optional(host: Any, name: str, x: Tensor) -> Tensor:
    module = getattr(host, name, None)
    return x if module is None else module(x)


class OpenCLIPResNet:
    """A ModifiedResNet, whose attention pool asks with the mean position alone."""

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
        q, k, v = (_heads(project(x), 1, pool.num_heads)[0] for project in (pool.q_proj, pool.k_proj, pool.v_proj))
        out, _ = ops.attention(q, k, v)
        return pool.c_proj(out.transpose(1, 2).flatten(2))
