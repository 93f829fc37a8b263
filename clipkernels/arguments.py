"""Checks of arguments that several operations and heads share.

A check raises a TypeError for a value that is no tensor or no named tuple, and a ValueError for any other fault. Its
message is one line, which names the argument, the expected and the actual value. Values of tensors are read on the CPU
alone, because elsewhere the host would wait for the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from clipkernels.backend import transform_obstacle
from clipkernels.custom_ops import can_skip_dispatcher
from clipkernels.messages import join_sizes
from clipkernels.reference import Norm

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_INT = 2**63 - 1
_REALS = (*_FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_tensors(**tensors: Any) -> None:
    """Raise unless every value is a dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(tensor)}")
        if tensor.is_nested:
            raise ValueError(f"{name} must be a dense tensor, got a nested one: pad it")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}: call to_dense()")


def check_numbers(**values: Any) -> None:
    """Raise ValueError unless every value is a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number, got {describe(value)}")


def check_positive(**values: Any) -> None:
    """Raise ValueError unless every value is a finite number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name} must be a positive number, got {describe(value)}")


def check_range(name: str, value: Any, low: float, high: float, ends: str = "[]") -> None:
    """Raise ValueError unless the value is a number from `low` to `high`; "(" and ")" are ends that are left out."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_number = is_number and (isinstance(value, float) or abs(value) <= sys.float_info.max)
    if (
        not (is_number and low <= value <= high)
        or (ends[0] == "(" and value == low)
        or (ends[1] == ")" and value == high)
    ):
        raise ValueError(f"{name} must be a number in {ends[0]}{low}, {high}{ends[1]}, got {describe(value)}")


def check_int(name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> None:
    """Raise ValueError unless the value is an int from `low` to `high`, which messages call `meaning`, or no limit."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= value <= (_LARGEST_INT if high is None else high):
        upper = f"at least {low}" if high is None else f"{low} to {meaning and f'{meaning} = '}{high}"
        raise ValueError(f"{name} must be an int {'of' if high is None else 'from'} {upper}, got {describe(value)}")


def check_flags(**values: Any) -> None:
    """Raise ValueError unless every value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {describe(value)}")


def check_choice(name: str, value: Any, *choices: str | None) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        *most, last = ("None" if choice is None else f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {describe(value)}")


def check_path(**values: Any) -> None:
    """Raise TypeError unless every value is a path."""
    for name, value in values.items():
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {describe(value)}")


def check_names(**values: Any) -> None:
    """Raise TypeError unless every value is text or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be text or None, got {describe(value)}")


def check_model(model: Any) -> None:
    """Raise TypeError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")


def check_callable(**values: Any) -> None:
    """Raise TypeError unless every value is callable or None."""
    check_calls(**{name: value for name, value in values.items() if value is not None})


def check_calls(**values: Any) -> None:
    """Raise TypeError unless every value is callable."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {describe(value)}")


def check_device(device: Any) -> torch.device:
    """The device; raise ValueError for a value that names none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f'device must be a torch.device or its name, such as "cpu", got {describe(device)}') from error


def check_mapping(**values: Any) -> None:
    """Raise TypeError unless every value is a mapping."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping, got {describe(value)}")


def check_tokens(x: Tensor) -> None:
    """Raise unless x is (B,N,C) of a supported float dtype, with at least one channel."""
    check_tensors(x=x)
    if x.ndim != 3 or not x.shape[2]:
        raise ValueError(f"x must be (B,N,C){' with C of at least 1' if x.ndim == 3 else ''}, got {shape_of(x)}")
    check_floating(x=x)


def check_scores(scores: Tensor, x: Tensor, patches: int, name: str) -> None:
    """Raise unless scores are (B,P) or (B,H,P) floats on the device of x."""
    check_tensors(**{name: scores})
    batch = x.shape[0]
    if scores.ndim not in (2, 3) or (scores.shape[0], scores.shape[-1]) != (batch, patches) or 0 in scores.shape[1:-1]:
        raise ValueError(f"{name} must be (B,P) = ({batch},{patches}) or (B,H,P), got {shape_of(scores)}")
    check_floating(**{name: scores})
    if scores.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {scores.device}")


def check_prefix(prefix: int, tokens: int) -> None:
    """Raise ValueError unless prefix is an int from 0 to the number of tokens."""
    check_int("prefix", prefix, 0, tokens, "N")


def check_size(size: Tensor | None, like: Tensor, batch: int, tokens: int) -> None:
    """Raise unless size is None or (B,N) finite numbers of at least 0 on the device of `like`, without a gradient."""
    if size is None:
        return
    check_tensors(size=size)
    if tuple(size.shape) != (batch, tokens) or size.device != like.device:
        actual = f"{shape_of(size)} on {size.device}"
        raise ValueError(f"size must be (B,N) = ({batch},{tokens}) on {like.device}, got {actual}")
    if size.dtype not in _REALS:
        raise ValueError(f"size must be real numbers, got {size.dtype}")
    if size.requires_grad and torch.is_grad_enabled():
        raise ValueError("size must not require a gradient, because it gets none: detach it")
    if values_are_readable(size) and not ((size >= 0) & (size < float("inf"))).all():
        raise ValueError("size must be finite and at least 0, got a negative, infinite or NaN size")


def check_norm(norm: Norm | None, x: Tensor) -> None:
    """Raise unless norm is None or (weight (C,), bias (C,), eps) for x (…,C)."""
    if norm is None:
        return
    if not isinstance(norm, (tuple, list)):
        raise TypeError(f"norm must be None or (weight, bias, eps), got {describe(norm)}")
    if len(norm) != 3:
        raise ValueError(f"norm must be (weight, bias, eps), got {len(norm)} values")
    weight, bias, eps = norm
    vectors = {"norm's weight": weight, "norm's bias": bias}
    if weight is None or bias is None:  # `check_vectors` accepts None
        check_tensors(**vectors)
    check_vectors(x, **vectors)
    check_positive(**{"norm's eps": eps})


def check_vectors(x: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is None or a float vector (C,) on the device of x (…,C)."""
    width, device = x.shape[-1], x.device
    for name, tensor in tensors.items():
        if tensor is None or _is_vector(tensor, width, device):
            continue
        check_tensors(**{name: tensor})
        if tensor.ndim != 1 or tensor.shape[0] != width or tensor.device != device:
            raise ValueError(f"{name} must be (C,) = ({width}) on {device}, got {shape_of(tensor)} on {tensor.device}")
        check_floating(**{name: tensor})


def _is_vector(value: Any, width: int, device: torch.device) -> bool:
    """Return true for a dense float vector (width,) on a device: in one go, because every block checks several."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.dtype in _FLOATS
        and value.ndim == 1
        and value.shape[0] == width
        and value.device == device
    )


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


def values_are_readable(*tensors: Tensor) -> bool:
    """Return true if a check may read the values: plain tensors on the CPU, no graph, no trace, no transform."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return False
    return can_skip_dispatcher(*tensors) and transform_obstacle() is None


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return true for a list, a tuple or another sequence, but no text and no bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def describe(value: object) -> str:
    """A value as messages show it, in one line: a number or a text itself, the shape of a tensor, else the type."""
    if isinstance(value, Tensor):
        return f"a tensor {shape_of(value)}" if not value.is_nested else "a nested tensor"
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        if isinstance(value, int) and abs(value) >= 10**20:  # Python refuses to print thousands of digits
            return f"an int of {value.bit_length()} bits"
        text = repr(value)
        return text if len(text) <= 80 else text[:79] + "…"
    return type(value).__name__


def shape_of(tensor: Tensor) -> str:
    """The shape of a tensor as messages show it: "(2,3)"."""
    return f"({join_sizes(tensor.shape)})"
