"""Heads turn features into logits: `head(features) -> (B,K)`, features (B,E) or an `Encoded`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from clipkernels.heads.calip import CALIP
from clipkernels.heads.multi_view import MultiView
from clipkernels.heads.reservoir import Reservoir
from clipkernels.heads.tda import TDA
from clipkernels.heads.tip import TipAdapter, TipX
from clipkernels.heads.zero_shot import ZeroShot

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

__all__ = ["CALIP", "TDA", "Head", "MultiView", "Reservoir", "TipAdapter", "TipX", "ZeroShot"]


class Head(Protocol):
    """A head as `ck.Classifier` calls it.

    `needs` names the extras of `ck.encode_image` ("tokens", "cls_path") that the head reads. A head may also have
    `anchors`, which are then passed to `ck.encode_image`; `reset`, which `Classifier.reset` calls; and `zero_shot`, a
    `ck.ZeroShot` that computes the cosine term, to which a classifier passes the scale and the bias of its model.
    """

    needs: tuple[str, ...]

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K)."""
