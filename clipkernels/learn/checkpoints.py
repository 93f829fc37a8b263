"""Small modules in safetensors files that say what they are for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from clipkernels.files import METADATA_KEY, read_metadata, read_tensors, write_tensors

ModuleType = TypeVar("Made", bound=nn.Module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generator of the CPU, and no other, begun anew; then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_training(name: str, epochs: int, batch_size: int) -> None:
    """Raises RuntimeError where nothing can be trained, ValueError for counts that train nothing."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} needs gradients: expected to be called outside of torch.inference_mode()")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least one, got {epochs} and {batch_size}")


def save_module(path: str | os.PathLike[str], module: Any, kind: str, sizes: Sequence[str]) -> None:
    """Writes a module's weights, the sizes that it was made with and its `about`, whole or not at all."""
    said = {"format": kind, **{name: getattr(module, name) for name in sizes}, "about": module.about}
    write_tensors(path, module.state_dict(), {METADATA_KEY: json.dumps(said)})


def load_module(cls: type[ModuleType], path: str | os.PathLike[str], kind: str, sizes: Sequence[str]) -> ModuleType:
    """What `save_module` wrote, in fp32, on the CPU, in eval mode.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    tensors, header = read_tensors(path)
    said = read_metadata(header)
    try:
        if said.get("format") != kind:
            raise ValueError(f"format {said.get('format')!r}")
        made: Any = cls
        with seeded(0):  # which leaves the generator of others alone
            module: ModuleType = made(**{name: int(said[name]) for name in sizes}, about=dict(said["about"]))
        module.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"expected a file of format {kind}, got {path}: {' '.join(str(error).split())}") from error
    return module.eval()
