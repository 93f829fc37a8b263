"""A recovery of a small tower with a checkpoint after every step, to be killed.

Arguments: the folder of the state, the file for the weights, and the seconds of a step at least.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels import run_folder
from clipkernels.learn.recovery import Recovered, recover, targets
from clipkernels.testing import open_clip_tower, randomized

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "held_out": 6, "lr": 1e-3, "contrast": 0.0, "seed": 1}


def small_tower() -> Any:
    """A CLIP of open_clip of 17 tokens and three blocks, with random weights."""
    torch.manual_seed(0)
    return randomized(open_clip_tower("ViT-B-32", 3, width=64, image_size=32, patch_size=8))


def noise(count: int = 40) -> torch.Tensor:
    """Images (n,3,32,32) of noise."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights and buffers of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(model: Any, **options: Any) -> Recovered:
    """Recover EViT(0.5) with the options of this module."""
    return recover(model, noise(), method=ck.EViT(0.5), **{**OPTIONS, **options})


if __name__ == "__main__":
    folder, file, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    torch.set_num_threads(1)
    run_folder.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    targets.PART_ROWS = 8
    tower = small_tower()
    print("started", flush=True)
    run(tower, state=folder, progress=lambda progress: time.sleep(pause))
    save_file(state_of(tower), file)
