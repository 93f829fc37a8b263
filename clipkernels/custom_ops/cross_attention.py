"""The operations `cross_attention` and `calip_logits` on the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.custom_ops import can_skip_dispatcher, kernels, register
from clipkernels.reference import CrossAttended


def cross_attention(visual: Tensor, text: Tensor, alpha: float) -> CrossAttended:
    call = _attend if can_skip_dispatcher(visual, text) else torch.ops.clipkernels.cross_attention
    return CrossAttended(call(visual, text, alpha), call(text, visual, alpha))


def calip_terms(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    call = _terms if can_skip_dispatcher(visual, pooled, text) else torch.ops.clipkernels.calip_terms
    return call(visual, pooled, text, alpha)


def _attend(rows: Tensor, columns: Tensor, alpha: float) -> Tensor:
    return kernels("cross_attention").attend(rows, columns, alpha)


def _attend_fake(rows: Tensor, columns: Tensor, alpha: float) -> Tensor:
    batch = rows.shape[0] if rows.ndim == 3 else columns.shape[0]
    return rows.new_empty(batch, *rows.shape[-2:])


def _terms(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    return kernels("cross_attention").calip_terms(visual, pooled, text, alpha)


def _terms_fake(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    return visual.new_empty(3, visual.shape[0], text.shape[0], dtype=torch.float32)


register("cross_attention(Tensor rows, Tensor columns, float alpha) -> Tensor", _attend, _attend_fake)
register("calip_terms(Tensor visual, Tensor pooled, Tensor text, float alpha) -> Tensor", _terms, _terms_fake)
