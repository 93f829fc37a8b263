"""Checks of arguments that several operations and heads share.

Every check raises a ValueError that names the expected and the actual value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipkernels.reference import Norm

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_numbers(**values: float) -> None:
    """Raise ValueError unless every value is a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_tokens(x: Tensor) -> None:
    """Raise ValueError unless x is (B,N,C) of a supported float dtype."""
    if x.ndim != 3:
        raise ValueError(f"x must be (B,N,C), got {shape_of(x)}")
    check_floating(x=x)


def check_scores(scores: Tensor, x: Tensor, patches: int, name: str) -> None:
    """Raise ValueError unless scores are (B,P) or (B,H,P) floats on the device of x."""
    batch = x.shape[0]
    if scores.ndim not in (2, 3) or (scores.shape[0], scores.shape[-1]) != (batch, patches) or 0 in scores.shape[1:-1]:
        raise ValueError(f"{name} must be (B,P) = ({batch},{patches}) or (B,H,P), got {shape_of(scores)}")
    check_floating(**{name: scores})
    if scores.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {scores.device}")


def check_prefix(prefix: int, tokens: int) -> None:
    """Raise ValueError unless prefix is an int from 0 to the number of tokens."""
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be an int from 0 to N = {tokens}, got {prefix!r}")


def check_size(size: Tensor | None, like: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless size is None or (B,N) on the device of `like`."""
    if size is not None and (tuple(size.shape) != (batch, tokens) or size.device != like.device):
        actual = f"{shape_of(size)} on {size.device}"
        raise ValueError(f"size must be (B,N) = ({batch},{tokens}) on {like.device}, got {actual}")


def check_norm(norm: Norm | None, x: Tensor) -> None:
    """Raise ValueError unless norm is None or (weight (C,), bias (C,), eps) for x (…,C)."""
    if norm is None:
        return
    if len(norm) != 3:
        raise ValueError(f"norm must be (weight, bias, eps), got {len(norm)} values")
    check_vectors(x, **{"norm's weight": norm[0], "norm's bias": norm[1]})
    check_numbers(**{"norm's eps": norm[2]})


def check_vectors(x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is None or a float vector (C,) on the device of x (…,C)."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != x.shape[-1:] or tensor.device != x.device:
            actual = f"{shape_of(tensor)} on {tensor.device}"
            raise ValueError(f"{name} must be (C,) = ({x.shape[-1]}) on {x.device}, got {actual}")
        check_floating(**{name: tensor})


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError unless every tensor is float32, float16, bfloat16 or float64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_same(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has the dtype and device of `like`."""
    for name, tensor in tensors.items():
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")


def shape_of(tensor: Tensor) -> str:
    """The shape of a tensor as messages show it: "(2,3)"."""
    return f"({join_sizes(tuple(tensor.shape))})"


def join_sizes(sizes: tuple[object, ...]) -> str:
    """Sizes separated by commas: "2,3"."""
    return ",".join(str(size) for size in sizes)


def list_names(names: Sequence[str] | set[str]) -> str:
    """The first ten names as text, and the number of the others."""
    texts = [repr(name) for name in (sorted(names) if isinstance(names, set) else names)]
    return ", ".join(texts[:10]) + (f" and {len(texts) - 10} more" if len(texts) > 10 else "")
