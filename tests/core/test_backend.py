"""The choice of the backend, and the errors when it cannot run."""

import subprocess
import sys

import pytest
import torch

from clipkernels import backend, ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def choose(name, device=CPU, dtype=torch.float32, refusal=None, **sizes):
    return backend.choose(name, device, dtype, "prune_tokens", refusal, **sizes)


def test_auto_is_the_reference_on_the_cpu_under_the_interpreter_too(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto") == "reference"


def test_auto_is_triton_on_cuda_where_a_kernel_exists(monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "_TRITON_VERSION", (3, 4))
    assert choose("auto", CUDA) == "triton"
    assert choose("auto", CUDA, refusal="takes 1 row, got 2") == "reference"
    assert choose("auto", CUDA, torch.float64) == "reference"


def test_auto_on_cuda_without_triton_warns_and_uses_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.warns(UserWarning, match="triton is not installed.*slower reference"):
        assert choose("auto", CUDA) == "reference"


@pytest.mark.parametrize("version", [(3, 2), (3, 3)])
def test_a_triton_that_cannot_compile_the_kernels_is_left_out(monkeypatch, version):
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "_TRITON_VERSION", version)
    message = f"the kernels need triton 3.4, which comes with torch 2.8, got 3.{version[1]}: install a newer torch"
    with pytest.warns(UserWarning, match=f"{message}; until then, CUDA tensors take the slower reference"):
        assert choose("auto", CUDA) == "reference"
    with pytest.raises(RuntimeError, match=message):
        choose("triton", CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton") == "triton"  # the interpreter compiles nothing


def test_the_version_of_triton_is_that_of_the_package():
    triton = pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    assert ".".join(map(str, backend._TRITON_VERSION)) == ".".join(triton.__version__.split(".")[:2])


def test_an_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="the tensors are on the CPU: move them to a GPU, or set TRITON_INTERPRET=1"):
        choose("triton")
    with pytest.raises(RuntimeError, match="the kernel of prune_tokens takes 1 row, got 2: use auto or reference"):
        choose("triton", CUDA, refusal="takes 1 row, got 2")
    with pytest.raises(RuntimeError, match="triton kernels run on cuda"):
        choose("triton", torch.device("mps"))
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        choose("triton", CUDA)


def test_sizes_beyond_a_kernel_take_the_reference_or_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "_obstacle", lambda device: None)
    assert choose("auto", CUDA, scores=4096, width=8192) == choose("triton", CUDA, scores=4096, pairs=4096) == "triton"
    for sizes, limit in (
        ({"scores": 4097}, "ranks at most 4096 scores of an image, got 4097"),
        ({"pairs": 4097}, "merges at most 4096 pairs of an image, got 4097"),
        ({"width": 8193}, "holds rows of at most 8192 elements, got 8193"),
    ):
        assert choose("auto", CUDA, **sizes) == choose("reference", CUDA, **sizes) == "reference"
        with pytest.raises(RuntimeError, match=f"but the kernel of prune_tokens {limit}: use auto or reference"):
            choose("triton", CUDA, **sizes)


@pytest.mark.parametrize("size", ["patches", "width"])
def test_every_operation_names_the_size_that_no_kernel_holds(monkeypatch, size):
    monkeypatch.setattr(backend, "_obstacle", lambda device: None)
    patches, width = (4097, 8) if size == "patches" else (5, 8193)
    x, scores = torch.zeros(1, 1 + patches, width), torch.zeros(1, patches)
    pairs = patches if size == "patches" else 1
    long = torch.zeros(1, 2 * pairs, width)
    index = torch.arange(pairs)[None]
    match = ops.Match(index[:, :0], index, torch.zeros_like(index))
    norm = (torch.ones(width), torch.zeros(width), 1e-5)
    calls = {
        "prune_tokens": lambda **o: ops.prune_tokens(x, scores, 3, **o),
        "condense_tokens": lambda **o: ops.condense_tokens(x, scores, 1, 3, 2, **o),
        "merge_tokens": lambda **o: ops.merge_tokens(long, match, **o),
    }
    if size == "patches":
        keys = torch.zeros(1, 1, 1 + patches, 8)
        calls["rank_tokens"] = lambda **o: ops.rank_tokens(keys[:, :, :1], keys, **o)
        calls["match_tokens"] = lambda **o: ops.match_tokens(torch.zeros(1, 2 * patches, 2), 0, **o)
    else:
        calls["match_tokens"] = lambda **o: ops.match_tokens(x, 1, **o)
        calls["add_norm"] = lambda **o: ops.add_norm(x, x, norm=norm, **o)
    for name, call in calls.items():
        assert call() is not None
        limit, given = (4096, patches) if size == "patches" else (8192, width)
        with pytest.raises(RuntimeError, match=f"the kernel of {name} .* at most {limit} .*, got {given}: use auto"):
            call(backend="triton")


def test_the_triton_backend_refuses_fp64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        choose("triton", CPU, torch.float64)


def test_the_environment_replaces_auto_alone(monkeypatch):
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "reference")
    assert choose("auto", CUDA) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton") == "triton"
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        choose("auto")


def test_explain_gives_the_backend_and_a_reason(monkeypatch):
    assert backend.explain(CPU) == ("reference", "on the CPU the PyTorch reference is the fast path")
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert backend.explain(CUDA) == ("reference", "triton is not installed: pip install triton (Linux)")
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "reference")
    assert backend.explain(CUDA) == ("reference", "CLIPKERNELS_BACKEND=reference is set")
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "fast")
    assert backend.explain(CPU) == (
        "none",
        'CLIPKERNELS_BACKEND must be "auto", "triton" or "reference", got \'fast\'',
    )
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "")
    assert choose("auto") == "reference"
    assert backend.explain(CPU) == ("reference", "on the CPU the PyTorch reference is the fast path")


def test_an_error_names_the_environment_variable_that_caused_it(monkeypatch):
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="CLIPKERNELS_BACKEND=triton is set, but the kernel of prune_tokens takes 1"):
        choose("auto", CUDA, refusal="takes 1 row, got 2")


@pytest.mark.slow  # test_packaging also runs every operation without triton
def test_a_tower_runs_on_the_reference_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, clipkernels as ck\n"
        "model, _, _ = ck.bundled()\n"
        "with torch.no_grad(), ck.patched(model, ck.EViT(0.5)):\n"
        "    print(tuple(ck.encode_image(model, torch.zeros(2, 3, 32, 32), tokens=True).tokens.shape))\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "(2, 11, 128)", process.stderr
