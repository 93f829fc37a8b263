"""Small modules in safetensors files, with the metadata that says which tower they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from clipkernels.arguments import check_callable, check_int, check_positive
from clipkernels.formats import FLOATS, Format, TensorSpec
from clipkernels.state_files import read_state, write_state

LARGEST_WEIGHT = torch.finfo(torch.float16).max
"""Limit of the weights in files, because a module follows its tower to half precision."""
ModuleType = TypeVar("ModuleType", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator, and no other, and restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_training(
    name: str, epochs: int, batch_size: int, seed: int, progress: Callable[..., object] | None, **positive: float
) -> None:
    """Raise RuntimeError in inference mode, and TypeError or ValueError for settings of a training out of range."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} needs gradients: expected a call outside of torch.inference_mode()")
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, 2**63 - 1, "2⁶³ - 1")
    check_positive(**positive)
    check_callable(progress=progress)


def weight_specs(shapes: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The tensors of a module's file, from their shapes as in `TensorSpec`."""
    return {name: TensorSpec(FLOATS, shape, -LARGEST_WEIGHT, LARGEST_WEIGHT) for name, shape in shapes.items()}


def save_module(path: str | os.PathLike[str], module: Any, form: Format) -> None:
    """Write a module's weights, and the attributes that its format names, atomically."""
    fields = form.header.__struct_fields__
    write_state(path, form, {name: getattr(module, name) for name in fields}, module.state_dict())


def load_module(cls: type[ModuleType], path: str | os.PathLike[str], form: Format) -> ModuleType:
    """The module that `save_module` wrote, in fp32, on the CPU, in eval mode.

    Raises:
        ValueError: the file holds something else, or not what was written.
        OSError: the file cannot be read.
    """
    header, tensors = read_state(path, form)
    with seeded(0):  # the constructor draws weights, which must not move the caller's generator
        module = cls(**header)
    module.load_state_dict(tensors)
    return module.eval()
