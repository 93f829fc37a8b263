"""One forward of an image tower, patched or not, and everything that it can hand back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.methods import Dense
from clipkernels.plan import Plan
from clipkernels.tower import SLOT, TowerInput, decide_reads, make_plan, run, unmerge_for_pool
from clipkernels.verify import refuse_replaced


class Encoded(NamedTuple):
    """What one forward of an image tower hands back.

    embedding (B,E): what the host's own encode_image returns, not normalised (CoCa's normalises unless told not to).
    tokens (B,N',E): all tokens after the final norm and projection, prefix first; CoCa's queries where those pool.
    cls_path (B,L,C): the CLS token after every block.
    source (B,S,P) int32: after each of the S steps the row that holds each patch, -1 where it is gone.
    prefix: the leading rows of tokens that are no patches.
    """

    embedding: Tensor
    tokens: Tensor | None = None
    cls_path: Tensor | None = None
    source: Tensor | None = None
    prefix: int = 1


def encode_image(
    model: nn.Module,
    images: Tensor,
    tokens: bool = False,
    cls_path: bool = False,
    source: bool = False,
    anchors: Tensor | None = None,
) -> Encoded:
    """The embedding of images and, where asked for, what led to it; on patched and unpatched towers.

    On open_clip's ResNets, which have no CLS path and no steps, every position of the last feature map asks the
    attention pool, and the mean position, row 0 of the tokens, gives the embedding.

    Composed of the host's own parts: hooks on its norms and MLPs fire, hooks on the whole tower do not.

    Args:
        model: what `patch` takes, or an open_clip ResNet.
        images: (B,3,S,S) preprocessed, in the tower's dtype and on its device.
        tokens: also return all tokens after final norm and projection.
        cls_path: also return the CLS token after every block.
        source: also return where each patch went.
        anchors: (A,L,C) CLS tokens after every block, such as `ck.Reservoir` has: where a method condenses, attention
            sees, as one more token, the anchor most like the image so far. Rows of zeros are no anchors; one at least
            must be more. Where patches are ranked by what they receive, they receive from the anchor too.
    Returns:
        Encoded.
    Raises:
        ValueError: images of another size than the tower's, or anchors of another depth or width.
        UnsupportedTower: as in `patch`; or a ResNet asked for `cls_path` or `source`, or given anchors.
    """
    resnet = adapters.find_resnet(model)
    if resnet is not None:
        if cls_path or source or anchors is not None:
            raise UnsupportedTower("expected a ViT for cls_path, source and anchors, got a ResNet")
        check_images(images, resnet.image_size)
        asked = resnet.tokens(images)
        return Encoded(asked[:, 0], asked if tokens else None)
    tower = adapters.find_tower(model)
    check_images(images, tower.image_size)
    if (cls_path or anchors is not None) and not tower.has_cls:
        wanted = "expected a tower with a CLS token for cls_path and anchors"
        raise UnsupportedTower(f"{wanted}, got {type(tower.root).__name__}")
    depth = len(tower.blocks)
    if anchors is not None and (anchors.ndim != 3 or anchors.shape[1:] != (depth, tower.width) or not len(anchors)):
        raise ValueError(f"anchors must be (A,{depth},{tower.width}) with A ≥ 1, got {tuple(anchors.shape)}")
    refuse_replaced(tower)
    x, rope = tower.embed(images)
    slot = tower.owner.__dict__.get(SLOT)
    plan = make_plan(Dense() if slot is None else slot.method, tower, x.shape[1])
    reads = decide_reads(plan, whole=not tower.pools_cls, every_row=tokens, source=source, path=cls_path)
    anchors = None if anchors is None else anchors.to(x.device)
    weights = {} if slot is None else slot.weights
    output = run(tower, TowerInput(x, rope, anchors=anchors), plan, reads, **weights)
    pooled = unmerge_for_pool(output, plan, reads)
    return Encoded(
        embedding=tower.pool(pooled),
        tokens=tower.project(pooled if tower.pools_with_queries else output.x) if tokens else None,
        cls_path=torch.stack(output.path, 1) if cls_path else None,
        source=_stacked(output.sources, x, plan) if source else None,
        prefix=plan.prefix,
    )


def check_images(images: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError unless images are (B,3,*size)."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
        came = ",".join(str(n) for n in images.shape)
        raise ValueError(f"images must be (B,3,{size[0]},{size[1]}), got ({came})")


def _stacked(sources: list[Tensor], x: Tensor, plan: Plan) -> Tensor:
    empty = torch.empty(x.shape[0], 0, plan.entry - plan.prefix, dtype=torch.int32, device=x.device)
    return torch.stack(sources, 1).int() if sources else empty
