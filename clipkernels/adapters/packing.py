"""Separate projections laid side by side in memory, so that one product serves all of them.

    before  q.weight (A,C)   k.weight (A,C)   v.weight (A,C)       three places, three products
    after   q.weight │ k.weight │ v.weight  =  (3·A,C)             neighbours, one product

The parameters stay the objects they were, each with a storage of its own, its values, gradients and names; only where
they lie changes. So `load_state_dict`, optimisers and `state_dict` work on the packed weight itself, and whatever moves
a parameter (`.to()`, `deepcopy`, `param.data = …`) is seen at the next call, which then takes three products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clipkernels.adapters.modules import is_linear, qkv_of, split_heads
from clipkernels.backend import transform_obstacle
from clipkernels.custom_ops import can_skip_dispatcher

# The memory that a parameter shares with its neighbours, as long as the parameter lives.
_WHOLE: Any = WeakTensorKeyDictionary()


def pack(projections: Sequence[nn.Module]) -> None:
    """Lays the weights, and the biases, of equally wide linear layers side by side; others are left as they are."""
    if not _packable(projections):
        return
    weights, biases = _parameters(projections)
    # Whoever patches under inference_mode wants weights that can be trained afterwards all the same.
    with torch.inference_mode(False), torch.no_grad():
        # A projection without a bias has zeros in between, which nobody else holds.
        blank = weights[0].detach().new_zeros(len(weights[0]))
        for parameters in (weights, biases):
            if all(p is None for p in parameters) or _joined(parameters) is not None:
                continue
            whole = torch.cat([blank if p is None else p.detach() for p in parameters])
            for parameter, place in zip(parameters, whole.chunk(len(parameters)), strict=True):
                if parameter is not None:
                    # By way of DLPack each has a storage of its own: a shared one would pass for tied weights.
                    parameter.data = torch.from_dlpack(place)
                    _WHOLE[parameter] = whole


def unpack(projections: Sequence[nn.Module]) -> None:
    """Gives every parameter that lies beside others memory of its own again, with the same values."""
    with torch.inference_mode(False), torch.no_grad():
        for projection in projections:
            for parameter in projection.parameters():
                if _WHOLE.pop(parameter, None) is not None:
                    parameter.data = parameter.detach().clone()


def packed_weights(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """One weight (n·A,C) and bias (n·A,) or None for all the projections, where they lie side by side right now.

    None where they do not, where gradients or tangents must reach each of them, and under a compiler, which cannot
    watch where memory lies.
    """
    if transform_obstacle() is not None or not all(is_linear(projection) for projection in projections):
        return None
    weights, biases = _parameters(projections)
    if not can_skip_dispatcher(*weights, *biases):
        return None
    weight, bias = _joined(weights), _joined(biases)
    if weight is None or (bias is None and any(b is not None for b in biases)):
        return None
    return weight, bias


def separate_qkv(
    projections: Sequence[nn.Module], x: Tensor, heads: int, rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by three projections, or by one where they are packed."""
    joined = packed_weights(projections)
    if joined is not None:
        return qkv_of(x, *joined, heads, rows)
    of_q, of_k, of_v = projections
    q, k, v = (split_heads(part, 1, heads)[0] for part in (of_q(x if rows is None else x[:, :rows]), of_k(x), of_v(x)))
    return q, k, v


def _parameters(projections: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The weights and the biases, None for those that are not there."""
    return [projection.weight for projection in projections], [projection.bias for projection in projections]


def _packable(projections: Sequence[nn.Module]) -> bool:
    """Whether all are linear layers of one shape, dtype and device, with ordinary parameters of their own."""
    if not projections or not all(type(projection) is nn.Linear for projection in projections):
        return False
    found = [parameter for projection in projections for parameter in projection.parameters(recurse=False)]
    alike = len({p.dtype for p in found}) == len({p.device for p in found}) == 1
    alike = alike and len({p.shape for p in found if p.ndim == 2}) == 1
    return alike and all(
        type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta and not p.is_inference() for p in found
    )


def _joined(parameters: Sequence[Any]) -> Tensor | None:
    """The tensor whose equal slices the parameters are right now, or None where they are not."""
    first = next((parameter for parameter in parameters if parameter is not None), None)
    whole = None if first is None else _WHOLE.get(first)
    if whole is None:
        return None
    step = whole.nbytes // len(parameters)
    for place, parameter in enumerate(parameters):
        if parameter is not None and (
            parameter.data_ptr() != whole.data_ptr() + place * step
            or parameter.nbytes != step
            or parameter.dtype != whole.dtype
            or parameter.stride() != whole.stride()
        ):
            return None
    return whole
