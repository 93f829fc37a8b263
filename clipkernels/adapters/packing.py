"""Pack separate projections side by side in memory, so that one matrix product computes all of them.

    before  q.weight (A,C)   k.weight (A,C)   v.weight (A,C)       three places, three products
    after   q.weight │ k.weight │ v.weight  =  (3·A,C)             neighbours, one product

Each parameter remains the same object with its own storage, values, gradient and name; only its address changes. So
`load_state_dict`, optimisers and `state_dict` work on the packed weight itself. After an operation that moves a
parameter (`.to()`, `deepcopy`, `param.data = …`), the next call sees the new address and computes three products.

On a CPU the product gains less than 2 % (bench/NOTES.md); its gain waits for a GPU. Fewer calls save 5-9 % of the
host's time.
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

# The tensor that contains a parameter and its neighbours, for as long as the parameter lives.
_BUFFERS: Any = WeakTensorKeyDictionary()


def pack(projections: Sequence[nn.Module]) -> None:
    """Pack the weights, and the biases, of linear layers of equal shape; leave any other projections unchanged."""
    if not _packable(projections):
        return
    weights, biases = _parameters(projections)
    # Weights patched under inference_mode must be trainable afterwards.
    with torch.inference_mode(False), torch.no_grad():
        # Zeros stand in for the bias of a projection that has none.
        zeros = weights[0].detach().new_zeros(len(weights[0]))
        for parameters in (weights, biases):
            if all(p is None for p in parameters) or _buffer_of(parameters) is not None:
                continue
            buffer = torch.cat([zeros if p is None else p.detach() for p in parameters])
            for parameter, view in zip(parameters, buffer.chunk(len(parameters)), strict=True):
                if parameter is not None:
                    # DLPack gives each its own storage: parameters that share a storage count as tied weights.
                    parameter.data = torch.from_dlpack(view)
                    _BUFFERS[parameter] = buffer


def unpack(projections: Sequence[nn.Module]) -> None:
    """Copy every packed parameter to its own memory again, with the same values."""
    with torch.inference_mode(False), torch.no_grad():
        for projection in projections:
            for parameter in projection.parameters():
                if _BUFFERS.pop(parameter, None) is not None:
                    parameter.data = parameter.detach().clone()


def packed_weights(projections: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """One weight (n·A,C), and one bias (n·A,) or None, for all the projections if they are packed right now.

    None if they are not packed, if gradients or tangents must reach each parameter, and under a compiler, which cannot
    check addresses.
    """
    if transform_obstacle() is not None or not all(is_linear(projection) for projection in projections):
        return None
    weights, biases = _parameters(projections)
    if not can_skip_dispatcher(*weights, *biases):
        return None
    weight, bias = _buffer_of(weights), _buffer_of(biases)
    if weight is None or (bias is None and any(b is not None for b in biases)):
        return None
    return weight, bias


def separate_qkv(
    projections: Sequence[nn.Module], x: Tensor, heads: int, rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B,H,rows or N,D), k and v (B,H,N,D) of x (B,N,C) by three projections, or by one product if packed."""
    weight_and_bias = packed_weights(projections)
    if weight_and_bias is not None:
        return qkv_of(x, *weight_and_bias, heads, rows)
    q_proj, k_proj, v_proj = projections
    outputs = (q_proj(x if rows is None else x[:, :rows]), k_proj(x), v_proj(x))
    q, k, v = (split_heads(output, 1, heads)[0] for output in outputs)
    return q, k, v


def _parameters(projections: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The weights and the biases; None for a missing bias."""
    return [projection.weight for projection in projections], [projection.bias for projection in projections]


def _packable(projections: Sequence[nn.Module]) -> bool:
    """Return true if all are plain linear layers of one shape, dtype and device, with ordinary parameters."""
    if not projections or not all(type(projection) is nn.Linear for projection in projections):
        return False
    parameters = [parameter for projection in projections for parameter in projection.parameters(recurse=False)]
    alike = len({p.dtype for p in parameters}) == len({p.device for p in parameters}) == 1
    alike = alike and len({p.shape for p in parameters if p.ndim == 2}) == 1
    return alike and all(
        type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta and not p.is_inference()
        for p in parameters
    )


def _buffer_of(parameters: Sequence[Any]) -> Tensor | None:
    """The tensor whose equal slices the parameters are right now, or None."""
    first = next((parameter for parameter in parameters if parameter is not None), None)
    buffer = None if first is None else _BUFFERS.get(first)
    if buffer is None:
        return None
    step = buffer.nbytes // len(parameters)
    for index, parameter in enumerate(parameters):
        if parameter is not None and (
            parameter.data_ptr() != buffer.data_ptr() + index * step
            or parameter.nbytes != step
            or parameter.dtype != buffer.dtype
            or parameter.stride() != buffer.stride()
        ):
            return None
    return buffer
