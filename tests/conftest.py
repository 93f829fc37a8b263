"""Runs Triton kernels in Triton's interpreter where there is no GPU: that must be decided before triton is imported."""

import os
from pathlib import Path

GPU = any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import clipkernels as ck  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: a GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def tiny() -> torch.nn.Module:
    """The bundled CLIP, fresh for each test."""
    return ck.bundled()[0]


@pytest.fixture
def images() -> torch.Tensor:
    """Three random images for the bundled CLIP."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
