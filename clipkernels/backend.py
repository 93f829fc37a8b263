"""The choice of the backend that runs an op. No other module knows about devices and the environment."""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "reference"]

# A kernel ranks an image's scores, and stores a row, in registers. Beyond these sizes it would spill most of them.
MAX_PATCHES = 4096
MAX_WIDTH = 8192

# Earlier compilers fail on some kernels, or abort the process: 3.2 and 3.3 on attention, affinity, cross-attention and
# prediction for compute capability 9.0, and on some of them for 8.0.
OLDEST_TRITON = (3, 4)


def _triton_version() -> tuple[int, int] | None:
    """The major and minor version of the installed triton, from its metadata; None if they do not say."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"):
        try:
            match = re.match(r"(\d+)\.(\d+)", version(name))
        except PackageNotFoundError:
            continue
        return (int(match[1]), int(match[2])) if match else None
    return None


_HAS_TRITON = find_spec("triton") is not None
_TRITON_VERSION = _triton_version()


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    refusal: str | None = None,
    *,
    scores: int = 0,
    pairs: int = 0,
    width: int = 0,
) -> str:
    """The backend that runs an op on tensors of this device and dtype: "triton" or "reference".

    Args:
        backend: "auto", "triton" or "reference"; CLIPKERNELS_BACKEND replaces only "auto".
        device: the device of the tensors.
        dtype: the dtype of the tensors.
        op: the name of the op, for messages.
        refusal: why the op's kernel does not take its arguments, as "takes LIMIT, got ARGUMENT"; None if it takes them.
        scores: number of scores that a kernel ranks per image.
        pairs: number of pairs that a kernel merges per image.
        width: elements of a row that a kernel holds.
    Raises:
        ValueError: the backend is unknown, or triton is requested for fp64.
        RuntimeError: triton is requested and cannot run here; the message gives the reason.
    """
    backend_name = requested_backend(backend) if isinstance(backend, str) else type(backend).__name__
    if backend_name not in ("auto", "triton", "reference"):
        name = "CLIPKERNELS_BACKEND" if isinstance(backend, str) and backend == "auto" else "backend"
        raise ValueError(f'{name} must be "auto", "triton" or "reference", got {backend_name!r:.80}')
    if backend_name == "reference":
        return backend_name
    refusal = refusal or _exceeded(scores, pairs, width)
    if backend_name == "auto":
        if device.type == "cpu" or refusal or dtype == torch.float64 or transform_obstacle() is not None:
            return "reference"
        obstacle = _obstacle(device)
        if obstacle is not None and device.type == "cuda":
            warnings.warn(f"{obstacle}; until then, CUDA tensors take the slower reference", stacklevel=3)
        return "triton" if obstacle is None else "reference"
    setting = 'backend="triton"' if backend == "triton" else "CLIPKERNELS_BACKEND=triton"
    if refusal:
        raise RuntimeError(f"{setting} is set, but the kernel of {op} {refusal}: use auto or reference")
    if dtype == torch.float64:
        raise ValueError(f'the triton backend of {op} takes float32, float16 or bfloat16, got float64: use "reference"')
    obstacle = transform_obstacle() or _obstacle(device)
    if obstacle is not None:
        raise RuntimeError(f"{setting} is set, but {obstacle}")
    return backend_name


def _exceeded(scores: int, pairs: int, width: int) -> str | None:
    """The limit that the arguments of an op exceed, and the argument, or None."""
    if scores > MAX_PATCHES:
        return f"ranks at most {MAX_PATCHES} scores of an image, got {scores}"
    if pairs > MAX_PATCHES:
        return f"merges at most {MAX_PATCHES} pairs of an image, got {pairs}"
    return f"holds rows of at most {MAX_WIDTH} elements, got {width}" if width > MAX_WIDTH else None


def requested_backend(backend: str) -> str:
    """The argument itself, or CLIPKERNELS_BACKEND in place of "auto"; an empty variable counts as unset."""
    automatic = isinstance(backend, str) and backend == "auto"
    return (os.environ.get("CLIPKERNELS_BACKEND") or "auto") if automatic else backend


def use_kernels(x: Tensor) -> bool:
    """Return true if a tower on tokens x (B,N,C) launches kernels for its sums, norms and activations too.

    Its operations then need no choice of their own: see `ops.unchecked`.
    """
    if choose("auto", x.device, x.dtype, "add_norm", width=x.shape[-1]) == "reference":
        return False
    # A compiler fuses them itself, and autocast decides the dtype of each norm.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return x.shape[1] <= MAX_PATCHES


def explain(device: torch.device) -> tuple[str, str]:
    """The backend that `auto` takes for tensors on a device, and the reason in one sentence."""
    override = requested_backend("auto")
    if override != "auto":
        try:
            return choose("auto", device, torch.float32, "any op"), f"CLIPKERNELS_BACKEND={override} is set"
        except (RuntimeError, ValueError) as error:
            return "none", str(error)
    if device.type == "cpu":
        return "reference", "on the CPU the PyTorch reference is the fast path"
    obstacle = _obstacle(device)
    if obstacle is not None:
        return "reference", obstacle
    return "triton", "triton is installed and supports this device; ops without a kernel take the reference"


def interpreting() -> bool:
    """Return true if Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def transform_obstacle() -> str | None:
    """The reason why no kernel can run under the active gradient transforms, or None."""
    if torch.compiler.is_compiling():
        return None
    # Private API of torch, tried with 2.6, 2.11, 2.14 and 2.15.
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "the kernels have no forward-mode gradients and no torch.func transforms: use the reference"
    return None


def _obstacle(device: torch.device) -> str | None:
    """The reason why triton cannot run on a device, or None."""
    if not _HAS_TRITON:
        return "triton is not installed: pip install triton (Linux)"
    if device.type == "cpu" and not interpreting():
        return "the tensors are on the CPU: move them to a GPU, or set TRITON_INTERPRET=1 before the first import"
    if device.type not in ("cpu", "cuda"):
        return f"triton kernels run on cuda (NVIDIA, AMD) tensors, got {device.type}"
    if device.type == "cuda" and _TRITON_VERSION is not None and _TRITON_VERSION < OLDEST_TRITON:
        found, needed = (".".join(map(str, each)) for each in (_TRITON_VERSION, OLDEST_TRITON))
        return f"the kernels need triton {needed}, which comes with torch 2.8, got {found}: install a newer torch"
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _too_old(device)
    return None


@cache  # every operation calls it
def _too_old(device: torch.device) -> str | None:
    """The reason why an NVIDIA GPU is too old for the kernels, or None."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
