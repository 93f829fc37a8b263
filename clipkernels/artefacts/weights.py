"""Weights of a model as plain tensors, the dtypes that it has them in, and models that cannot be saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.messages import list_names

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)
"""Dtypes of buffers such as positions and counts of batches; no parameter has one."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, DataParallel or DistributedDataParallel."""
    while True:
        inner = getattr(model, "_modules", {}).get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as contiguous copies on the CPU; no two share memory.

    Raises:
        ValueError: adapters that are not merged, quantised or sharded weights, weights without values, a dtype that
            state files do not have, or a wrapper around a part.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or type(module).__module__.startswith("peft."):
            raise ValueError(
                f"expected a model without adapters, got {type(module).__name__} at {name or 'its root'}: call "
                "merge_and_unload() first"
            )
        if "_orig_mod" in module._modules:
            raise ValueError(
                f"expected modules of the library, got {type(module).__name__} at {name}: compile after ck.load"
            )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "expected weights in float32, float16 or bfloat16, got a quantised model: quantise after ck.load"
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: Mapping[str, Any] = model.state_dict()
    for name, tensor in state.items():
        allowed = PRECISIONS if name in parameters else (*PRECISIONS, *WHOLE)
        plain = isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.dtype not in allowed or tensor.is_quantized:
            actual = tensor.dtype if plain else type(tensor).__name__
            raise ValueError(
                f"expected weights in float32, float16 or bfloat16, got {name} as {actual}: save before quantising or "
                "sharding"
            )
        if tensor.is_meta:
            raise ValueError(f"expected weights with values, got {name} on the meta device: load them first")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def precisions_of(model: nn.Module) -> tuple[str, dict[str, str]]:
    """The dtype of most floating weights and buffers, and the dtypes of the others by name."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in _floating(model)}
    [(most, _)] = Counter(dtypes.values()).most_common(1)
    return most, {name: dtype for name, dtype in dtypes.items() if dtype != most}


def restore_precisions(model: nn.Module, precision: str, precisions: Mapping[str, str]) -> None:
    """Cast the floating weights and buffers of a model to the dtypes of `precisions_of`.

    Raises:
        ValueError: a name that the model does not have.
    """
    tensors = dict(_floating(model))
    if unknown := precisions.keys() - tensors.keys():
        raise ValueError(f"expected names of weights, got {list_names(unknown)}")
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(getattr(torch, precisions.get(name, precision)))


def first_difference(first: nn.Module, second: nn.Module) -> str | None:
    """The name of the first weight or buffer in which two models differ, in dtype, shape or any bit; None if equal."""
    one, other = first.state_dict(), second.state_dict()
    for name in sorted(one.keys() ^ other.keys()):
        return name
    for name, tensor in one.items():
        if not same_bits(tensor, other[name]):
            return name
    return None


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return true for tensors of one dtype, shape and bits, on any devices."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = (x.detach().cpu().contiguous().flatten().view(torch.uint8) for x in (first, second))
    return torch.equal(one, other)


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (model.named_parameters(), model.named_buffers()):
        yield from ((name, tensor) for name, tensor in named if tensor.is_floating_point())
