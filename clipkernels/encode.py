"""One forward of an image tower, patched or not, with every intermediate that it can return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.arguments import check_flags, check_floating, check_tensors, describe, shape_of
from clipkernels.methods import Dense
from clipkernels.plan import Plan
from clipkernels.slot import SLOT
from clipkernels.tower import TowerInput, decide_reads, make_plan, run, unmerge_for_pool
from clipkernels.verify import refuse_replaced


class Encoded(NamedTuple):
    """The result of one forward of an image tower.

    embedding (B,E): the output of the host's own encode_image, not normalised (CoCa's normalises by default).
    tokens (B,N',E): all tokens after the final norm and projection, prefix first; the answers of the pool's queries
        if it pools with several, as CoCa does.
    cls_path (B,L,C): the CLS token after every block.
    source (B,S,P) int32: the row that holds each patch after each of the S steps, -1 if the patch is gone.
    prefix: number of leading rows of tokens that are not patches.
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
    """The embedding of images and, on request, its intermediates; for patched and unpatched towers.

    On open_clip's ResNets, which have no CLS path and no steps, every position of the last feature map queries the
    attention pool. The mean position, row 0 of the tokens, gives the embedding.

    The forward is composed of the host's own parts: hooks on its blocks, norms and MLPs fire, hooks on the whole
    tower do not.

    Args:
        model: a model that `patch` takes, an open_clip ResNet, or an exported model, which gives the embedding alone.
        images: (B,3,S,S) preprocessed, in the tower's dtype and on its device.
        tokens: also return all tokens after the final norm and projection.
        cls_path: also return the CLS token after every block.
        source: also return the row that holds each patch after each step.
        anchors: (A,L,C) CLS tokens after every block, as `ck.Reservoir` caches them. In a block that condenses, the
            anchor most similar to the image's CLS token before that block joins attention as one more token. Rows of
            zeros do not count as anchors; at least one row must be non-zero. If patches are ranked by the attention
            they receive, the anchor's attention counts too.
    Returns:
        Encoded.
    Raises:
        ValueError: the images do not have the tower's size, or the anchors do not have its depth and width.
        TypeError: the images are not a tensor.
        UnsupportedTower: as in `patch`; or `cls_path`, `source` or anchors are given with a ResNet.
    """
    check_flags(tokens=tokens, cls_path=cls_path, source=source)
    exported = adapters.find_exported(model)
    if exported is not None:
        if tokens or cls_path or source or anchors is not None:
            raise UnsupportedTower("expected a model in PyTorch for more than the embedding, got an exported one")
        check_images(images, exported.image_size)
        host: Any = model
        return Encoded(host.encode_image(images))
    resnet = adapters.find_resnet(model)
    if resnet is not None:
        if cls_path or source or anchors is not None:
            raise UnsupportedTower("expected a ViT for cls_path, source and anchors, got a ResNet")
        check_images(images, resnet.image_size)
        positions = resnet.tokens(images)
        return Encoded(positions[:, 0], positions if tokens else None)
    tower = adapters.find_tower(model)
    check_images(images, tower.image_size)
    if (cls_path or anchors is not None) and not tower.has_cls:
        expected = "expected a tower with a CLS token for cls_path and anchors"
        raise UnsupportedTower(f"{expected}, got {type(tower.root).__name__}")
    depth = len(tower.blocks)
    if anchors is not None:
        check_tensors(anchors=anchors)
        if anchors.ndim != 3 or anchors.shape[1:] != (depth, tower.width) or not len(anchors):
            raise ValueError(f"anchors must be (A,{depth},{tower.width}) with A ≥ 1, got {shape_of(anchors)}")
        check_floating(anchors=anchors)
    refuse_replaced(tower)
    x, rope = tower.embed(images)
    slot = tower.owner.__dict__.get(SLOT)
    plan = make_plan(Dense() if slot is None else slot.method, tower, int(x.shape[1]))  # a tensor under torch.jit.trace
    reads = decide_reads(plan, patches=not tower.pools_cls, every_row=tokens, source=source, path=cls_path)
    anchors = None if anchors is None else anchors.to(x.device)
    options: dict[str, Any] = {} if slot is None else {"cache": slot.cache, **slot.modules()}
    output = run(tower, TowerInput(x, rope, anchors=anchors), plan, reads, **options)
    pooled = unmerge_for_pool(output, plan, reads)
    return Encoded(
        embedding=tower.pool(pooled),
        tokens=tower.project(pooled if tower.pools_with_queries else output.x) if tokens else None,
        cls_path=torch.stack(output.path, 1) if cls_path else None,
        source=_stack_sources(output.sources, x, plan) if source else None,
        prefix=plan.prefix,
    )


def tower_weight(model: nn.Module) -> Tensor:
    """A weight that has the device and the dtype of a model's image tower.

    It is the patch convolution's, because open_clip keeps other weights of a half-precision tower in fp32.
    """
    return next((weight for weight in model.parameters() if weight.ndim == 4), next(model.parameters()))


def check_images(images: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless images are (B,3,*size), TypeError unless they are a tensor."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (B,3,{size[0]},{size[1]}), got {type(images).__name__}")
    check_tensors(images=images)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
        raise ValueError(f"images must be (B,3,{size[0]},{size[1]}), got {shape_of(images)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be preprocessed, of a floating dtype, got {images.dtype}")


def check_images_list(images: Any) -> None:
    """Raise TypeError unless images are a tensor (n,3,S,S) or can be read one by one, and ValueError if there are none.

    Their sizes are checked as they are read.
    """
    readable = isinstance(images, Tensor) or all(hasattr(images, name) for name in ("__len__", "__getitem__"))
    if (
        not readable
        or isinstance(images, (str, bytes, Mapping, type))
        or (isinstance(images, Tensor) and images.ndim != 4)
    ):
        raise TypeError(f"images must be a tensor (n,3,S,S) or a sequence of (3,S,S), got {describe(images)}")
    if not len(images):
        raise ValueError("images must hold at least one image, got none")


def _stack_sources(sources: list[Tensor], x: Tensor, plan: Plan) -> Tensor:
    """The sources of S steps as one tensor (B,S,P) int32."""
    empty = torch.empty(x.shape[0], 0, plan.entry - plan.prefix, dtype=torch.int32, device=x.device)
    return torch.stack(sources, 1).int() if sources else empty
