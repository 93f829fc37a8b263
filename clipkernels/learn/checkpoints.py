"""Small modules in safetensors files, with the metadata that says which tower they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from clipkernels.files import METADATA_KEY, read_metadata, read_tensors, write_tensors

ModuleType = TypeVar("ModuleType", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator, and no other, and restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_training(name: str, epochs: int, batch_size: int) -> None:
    """Raise RuntimeError in inference mode, and ValueError if epochs or batch_size is below one."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} needs gradients: expected a call outside of torch.inference_mode()")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least one, got {epochs} and {batch_size}")


def save_module(path: str | os.PathLike[str], module: Any, kind: str, sizes: Sequence[str]) -> None:
    """Write a module's weights, its constructor's sizes and its `about`, atomically."""
    metadata = {"format": kind, **{name: getattr(module, name) for name in sizes}, "about": module.about}
    write_tensors(path, module.state_dict(), {METADATA_KEY: json.dumps(metadata)})


def load_module(cls: type[ModuleType], path: str | os.PathLike[str], kind: str, sizes: Sequence[str]) -> ModuleType:
    """The module that `save_module` wrote, in fp32, on the CPU, in eval mode.

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read.
    """
    tensors, header = read_tensors(path)
    metadata = read_metadata(header)
    try:
        if metadata.get("format") != kind:
            raise ValueError(f"format {metadata.get('format')!r}")
        factory: Any = cls
        with seeded(0):  # the constructor draws weights, which must not move the caller's generator
            module: ModuleType = factory(**{name: int(metadata[name]) for name in sizes}, about=dict(metadata["about"]))
        module.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected a file of format {kind}, got {path}: {' '.join(str(error).split())}") from error
    return module.eval()
