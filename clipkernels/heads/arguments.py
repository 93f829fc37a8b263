"""Checks of the arguments of heads, and their normalisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.arguments import check_tensors, describe, shape_of
from clipkernels.messages import quantity

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


def check_rows(name: str, meaning: str, x: Any, width: int | None = None, finite: bool = True) -> Tensor:
    """The tensor x, if it holds floating-point rows (n,E).

    Args:
        name: the name of the argument, for messages.
        meaning: the shape in words, such as "(n,E)".
        x: the argument.
        width: E, or None for any.
        finite: require finite rows. Their values are read unless there are none, as in a graph.
    Raises:
        TypeError: x is no tensor.
        ValueError: another shape, dtype or width, or rows that are not finite.
    """
    check_tensors(**{name: x})
    if x.ndim != 2 or width not in (None, x.shape[1]):
        suffix = "" if width is None else f" with E = {width}"
        raise ValueError(f"{name} must be {meaning}{suffix}, got {shape_of(x)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
    if finite and not x.is_meta and not torch.compiler.is_compiling():
        wrong = int((~x.isfinite().all(1)).sum())
        if wrong:
            raise ValueError(f"{name} must be finite, got {wrong} of {quantity(len(x), 'row')} that are not")
    return cast(Tensor, x)


def check_labels(labels: Any, images: int, classes: int) -> Tensor:
    """The labels, if they are (n,) int64 in 0..K-1.

    Raises:
        TypeError: labels that are no tensor.
        ValueError: labels of another shape, dtype or range.
    """
    check_tensors(labels=labels)
    if labels.shape != (images,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (n,) = ({images}) torch.int64, got {shape_of(labels)} {labels.dtype}")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {span}")
    return cast(Tensor, labels)


def check_not_empty(images: int) -> None:
    """Raise ValueError unless there is at least one image to fit on."""
    if not images:
        raise ValueError("features must be of at least one image, got none")


def embedding_of(features: Any, width: int) -> Tensor:
    """The embeddings (B,E) of features, which are the embeddings themselves or an `Encoded`.

    Raises:
        TypeError: features of another type.
        ValueError: another shape or dtype.
    """
    image = features if isinstance(features, Tensor) else getattr(features, "embedding", None)
    if not isinstance(image, Tensor):
        raise TypeError(f"features must be a torch.Tensor (B,E) or an Encoded, got {describe(features)}")
    return check_rows("features", "(B,E)", image, width, finite=False)


def encoded_with(part: str, features: Any) -> Encoded:
    """The features, if they are an `Encoded` with the extra `part`; raise ValueError for anything else."""
    if not all(isinstance(getattr(features, name, None), Tensor) for name in ("embedding", part)):
        expected = f"features must be an Encoded with {part}, as ck.encode_image({part}=True) gives"
        raise ValueError(f"{expected}, got {describe(features)}")
    return cast("Encoded", features)


def check_batches(features: Any) -> Any:
    """An iterable of `Encoded`: the features themselves, or one `Encoded` in a list; raise TypeError for others."""
    if hasattr(features, "embedding"):
        return [features]
    if isinstance(features, (Tensor, type)) or not isinstance(features, Iterable):
        raise TypeError(f"features must be an Encoded, or an iterable of them, got {describe(features)}")
    return features


def normalize_as(x: Tensor, like: Tensor) -> Tensor:
    """L2-normalised rows in the dtype of `like`, computed in fp32 or wider."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(like.dtype)
