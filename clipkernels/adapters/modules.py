"""Read the weights of a host's norms, scales, projections and MLPs, instead of calling the modules.

A module is read only if it does exactly what its class does: it has no hook, no replaced forward, and is not a
subclass. Its weights must have the sizes that its class gives them, because kernels do not check them again. Any other
module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from clipkernels.adapters.hooks import has_global_hooks, has_hooks, hook_attributes
from clipkernels.block import Branch
from clipkernels.ops import unchecked
from clipkernels.reference import Act, Norm

_LIBRARIES = ("torch", "open_clip", "timm", "transformers", "clip")
_ACTS: dict[str, Act] = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def norm_of(module: nn.Module) -> Norm | None:
    """(weight, bias, eps) of a plain LayerNorm, or None if the module must be called."""
    if (
        not isinstance(module, nn.LayerNorm)
        or _name(module) not in ("LayerNorm", "LayerNormFp32")
        or is_modified(module)
    ):
        return None
    weight, bias = module.weight, module.bias
    if weight is None or bias is None or not len(module.normalized_shape) == weight.ndim == bias.ndim == 1:
        return None
    return (weight, bias, module.eps) if (*weight.shape, *bias.shape) == 2 * module.normalized_shape else None


def act_of(module: nn.Module) -> Act | None:
    """The activation function of a module, or None if the module must be called."""
    act = _ACTS.get(_name(module))
    if act is None or is_modified(module):
        return None
    return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else act


def is_linear(module: nn.Module) -> bool:
    """Return true if a projection computes weight·x + bias and nothing else."""
    return type(module) is nn.Linear and not is_modified(module)


def scale_of(module: nn.Module) -> tuple[bool, Tensor | None]:
    """True if a layer scale may be read, and its gamma, which is None for an identity."""
    name = _name(module)
    if name not in ("Identity", "LayerScale") or is_modified(module):
        return False, None
    scale: Any = module
    return True, scale.gamma if name == "LayerScale" else None


def is_noop(module: nn.Module) -> bool:
    """Return true if a module returns its input: an identity, or an inactive dropout."""
    if is_modified(module):
        return False
    return type(module) is nn.Identity or (type(module) is nn.Dropout and (not module.training or module.p == 0))


def is_modified(module: nn.Module) -> bool:
    """Return true if calling a module does more than its class's forward."""
    return is_forward_replaced(module) or has_hooks(module) or has_global_hooks()


def is_forward_replaced(module: nn.Module) -> bool:
    """Return true if a module's forward is not its class's."""
    forward = module.__dict__.get("forward")
    # transformers 4 leaves the class's own forward in the instance.
    is_own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return (forward is not None and not is_own) or "_hf_hook" in module.__dict__


def bypass_reason(
    host: nn.Module, *bypassed: nn.Module, harmless: Callable[[nn.Module], bool] | None = None
) -> str | None:
    """The reason why a patched tower cannot run a block in place of its own forward, or None.

    Args:
        host: the block, whose hooks the patched tower calls.
        bypassed: modules of the block that are never called.
        harmless: returns true for a bypassed module whose hooks may be skipped.
    """
    for module in (host, *bypassed):
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"its {type(module).__name__} is compiled by itself: compile the whole tower instead"
        if is_forward_replaced(module):
            return f"the forward of its {type(module).__name__} was replaced: patch the model first"
        if has_hooks(module):
            if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
                return (
                    f"its {type(module).__name__} is sharded by itself: call fully_shard on the whole model alone, "
                    "after ck.patch"
                )
            if module is host and module._backward_hooks and not module._is_full_backward_hook:
                return "its hook is one of register_backward_hook: use register_full_backward_hook"
            if module is not host and not (harmless and harmless(module)):
                return _skipped_hooks(host, module)
        if any(type(p) is not nn.Parameter and hasattr(p, "device_mesh") for p in module._parameters.values()):
            return f"its {type(module).__name__} has sharded parameters: patch the model before sharding it"
    return None


def _skipped_hooks(host: nn.Module, module: nn.Module) -> str:
    """The reason to refuse a module of a block whose hooks would be skipped, and the code that removes them."""
    name = next(name for name, child in host.named_modules() if child is module)
    clear = "; ".join(f"block.{name}.{attribute}.clear()" for attribute in hook_attributes(module))
    return (
        f"its {name} ({type(module).__name__}) carries a hook, which a patched tower would skip: remove it by its "
        f"handle, or clear all by `for block in ck.tower_of(model).blocks: {clear}`"
    )


def refuse_mask(attn_mask: Tensor | None, is_causal: bool = False) -> None:
    """Raise ValueError if a host's loop is called with a mask, which no image tower needs."""
    if attn_mask is not None or is_causal:
        actual = "is_causal=True" if attn_mask is None else f"an attn_mask of shape {tuple(attn_mask.shape)}"
        raise ValueError(f"a patched tower takes no mask, got {actual}")


def split_heads(packed: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    """`parts` views (B,H,N,D) of a packed projection (B,N,parts·C)."""
    return packed.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def qkv_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,H,rows or N,D), k and v (B,H,N,D) of x (B,N,C) with one packed weight (3·A,C) and bias (3·A,) or None."""
    if rows is None:
        q, k, v = split_heads(linear(x, weight, bias), 3, heads)
        return q, k, v
    width = weight.shape[0] // 3
    (q,) = split_heads(linear(x[:, :rows], weight[:width], None if bias is None else bias[:width]), 1, heads)
    k, v = split_heads(linear(x, weight[width:], None if bias is None else bias[width:]), 2, heads)
    return q, k, v


class PlainLinear(NamedTuple):
    """The branch scale·(weight·x + bias) whose bias and scale are left to the sum that follows.

    weight is (C,A), bias and scale are (C,) or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def branch(self, x: Tensor) -> Branch:
        return Branch(linear(x, self.weight), self.bias, self.scale)


class PlainMLP(NamedTuple):
    """The branch contract(act(weight·x + bias)) with its activation as a kernel."""

    weight: Tensor
    bias: Tensor | None
    act: Act
    contract: PlainLinear

    def branch(self, x: Tensor) -> Branch:
        return self.contract.branch(unchecked.bias_act(linear(x, self.weight), self.bias, self.act))


def plain_linear(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> PlainLinear | None:
    """The branch of a projection, or None if bias and scale do not have one element per row of the weight."""
    width = (weight.shape[0],)
    fits = all(vector is None or tuple(vector.shape) == width for vector in (bias, scale))
    return PlainLinear(weight, bias, scale) if fits else None


def linear_of(projection: nn.Module, scale: Tensor | None = None) -> PlainLinear | None:
    """The branch scale·projection, or None if the projection must be called."""
    plain: Any = projection
    return plain_linear(plain.weight, plain.bias, scale) if is_linear(projection) else None


def mlp_of(expand: nn.Module, act: nn.Module, contract: nn.Module, scale: Tensor | None) -> PlainMLP | None:
    """The branch scale·contract(act(expand)), or None if a module must be called."""
    kind, first, second = act_of(act), linear_of(expand), linear_of(contract, scale)
    if kind is None or first is None or second is None:
        return None
    return PlainMLP(first.weight, first.bias, kind, second)


def ratio_of(mlp: nn.Module, width: int) -> float:
    """Multiply-accumulates of an MLP per token over 2·C². For two layers this is the hidden width over C."""
    sizes = ((getattr(module, "in_features", 0), getattr(module, "out_features", 0)) for module in mlp.modules())
    return sum(rows * columns for rows, columns in sizes) / (2 * width**2)


def _name(module: nn.Module) -> str:
    """The name of a module's class if a supported library defines it, or the empty string."""
    kind = type(module)
    return kind.__name__ if kind.__module__.split(".")[0] in _LIBRARIES else ""
