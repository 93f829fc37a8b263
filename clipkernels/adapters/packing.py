"""Separate projections laid side by side in one storage, so that one product serves all of them.

    before  q.weight (A,C)   k.weight (A,C)   v.weight (A,C)       three storages, three products
    after   q.weight │ k.weight │ v.weight  =  (3·A,C)             views of one storage, one product

The parameters stay the objects they were, with their values, gradients and names; only where they lie changes. So
`load_state_dict`, optimisers and `state_dict` work on the packed weight itself, and whatever gives a parameter another
storage (`.to()`, `deepcopy`, `param.data = …`) is seen at the next call, which then takes three products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.adapters.parts import is_linear, qkv_of, split_heads
from clipkernels.custom_ops import plain


def pack(projections: Sequence[nn.Module]) -> None:
    """Lays the weights, and the biases, of equally wide linear layers side by side; others are left as they are."""
    if not _packable(projections):
        return
    weights, biases = _parameters(projections)
    # A projection without a bias has zeros in between, which nobody else holds.
    blank = weights[0].detach().new_zeros(len(weights[0]))
    with torch.no_grad():
        for parameters in (weights, biases):
            if any(p is not None for p in parameters) and _joined(parameters, len(blank)) is None:
                storage = torch.cat([blank if p is None else p.detach() for p in parameters])
                for parameter, place in zip(parameters, storage.chunk(len(parameters)), strict=True):
                    if parameter is not None:
                        parameter.data = place


def unpack(projections: Sequence[nn.Module]) -> None:
    """Gives every parameter that shares its storage with a neighbour one of its own again, with the same values."""
    if not _packable(projections):
        return
    weights, biases = _parameters(projections)
    with torch.no_grad():
        for parameters in (weights, biases):
            if _joined(parameters, len(weights[0])) is not None:
                for parameter in filter(lambda found: found is not None, parameters):
                    parameter.data = parameter.detach().clone()


def packed(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """One weight (n·A,C) and bias (n·A,) or None for all the projections, where their storage is shared right now.

    None where it is not, where a gradient must reach each of them, and under a compiler, which cannot watch storages.
    """
    if not all(is_linear(projection) for projection in projections):
        return None
    weights, biases = _parameters(projections)
    if not plain(*weights, *biases):
        return None
    weight, bias = _joined(weights, len(weights[0])), _joined(biases, len(weights[0]))
    if weight is None or (bias is None and any(b is not None for b in biases)):
        return None
    return weight, bias


def separate_qkv(
    projections: Sequence[nn.Module], x: Tensor, heads: int, rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by three projections, or by one where they are packed."""
    joined = packed(projections)
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


def _joined(parameters: Sequence[Tensor | None], rows: int) -> Tensor | None:
    """The tensor whose slices of `rows` rows the parameters are, or None where they are not."""
    first = next((parameter for parameter in parameters if parameter is not None), None)
    if first is None:
        return None
    step, storage = first.numel(), first.untyped_storage()
    if storage.nbytes() != len(parameters) * step * first.element_size():
        return None
    for place, parameter in enumerate(parameters):
        if parameter is not None and (
            parameter.storage_offset() != place * step
            or parameter.untyped_storage().data_ptr() != storage.data_ptr()
            or parameter.stride() != first.stride()
        ):
            return None
    return first.detach().as_strided((len(parameters) * rows, *first.shape[1:]), first.stride(), 0)
