"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Triton reads TRITON_INTERPRET when it is imported.
GPU = Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import clipkernels as ck  # noqa: E402
from clipkernels.testing import GuardedAllocations, exact_interpreter_dot  # noqa: E402

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run the tests of a module on one thread, because on a busy machine threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model that is registered in open_clip for one test."""
    import open_clip  # the tests of the kernels also run without it

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-test", TINY)
    return "ViT-tiny-test"


@pytest.fixture
def resnet(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small ResNet that is registered in open_clip for one test."""
    import open_clip

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "RN-test", {**TINY, "embed_dim": 32, "vision_cfg": vision})
    return "RN-test"


@pytest.fixture
def device() -> torch.device:
    """The device that kernels run on: a GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend; buffers that kernels allocate are poisoned and guarded."""
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


@pytest.fixture
def triton() -> Iterator[str]:
    """The name of the Triton backend; buffers that its kernels allocate are poisoned and guarded."""
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    with GuardedAllocations(), exact_interpreter_dot():
        yield "triton"


@pytest.fixture
def tiny() -> torch.nn.Module:
    """The bundled CLIP, fresh for each test."""
    return ck.bundled()[0]


@pytest.fixture
def images() -> torch.Tensor:
    """Three random images for the bundled CLIP."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def set_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object, str, object], None]]:
    """A function that sets an attribute of a module of kernels/ for one test; launches are made anew."""

    from clipkernels.kernels.launch import forget_launches

    def change(module: object, name: str, value: object) -> None:
        monkeypatch.setattr(module, name, value)
        forget_launches()

    yield change
    monkeypatch.undo()
    forget_launches()
