"""Runs Triton kernels in Triton's interpreter where there is no GPU: that must be decided before triton is imported."""

import os
from collections.abc import Iterator
from pathlib import Path

GPU = Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import clipkernels as ck  # noqa: E402
from clipkernels.testing import guarded  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: a GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Either backend; what the kernels allocate is poisoned and guarded."""
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


@pytest.fixture
def triton() -> Iterator[str]:
    """The Triton backend's name; what its kernels allocate is poisoned and guarded."""
    pytest.importorskip("triton", reason="triton is not installed: it is on Linux alone")
    with guarded():
        yield "triton"


@pytest.fixture
def tiny() -> torch.nn.Module:
    """The bundled CLIP, fresh for each test."""
    return ck.bundled()[0]


@pytest.fixture
def images() -> torch.Tensor:
    """Three random images for the bundled CLIP."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
