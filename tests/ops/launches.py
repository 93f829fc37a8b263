"""Print, as JSON, what launches of kernels do under a driver that launches nothing. Run without TRITON_INTERPRET.

With --layouts, compare the later launches of every operation with those that triton itself makes.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import stub_driver
from clipkernels.kernels import (
    affinity,
    attention,
    condense,
    cross_attention,
    epilogue,
    launch,
    merge,
    predict,
    prune,
    rank,
    targeted_l1,
)
from clipkernels.kernels.launch import forget_launches

STUB = stub_driver.install()
WIDTH = 64
through_triton: list[Any] = []


def count_runs() -> None:
    """Let every launch by `JITFunction.run` note its kernel."""
    run = triton.JITFunction.run

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        through_triton.append(kernel)
        return run(kernel, *arguments, **options)

    triton.JITFunction.run = counted


def call(dtype: torch.dtype = torch.bfloat16, norm_dtype: torch.dtype | None = None, offset: int = 0) -> Any:
    """Launch `add_norm` on new tensors; `offset` moves the branch from a multiple of 16 bytes. Return the launch."""
    x, y = torch.zeros(2, 5, WIDTH, dtype=dtype), torch.zeros(10 * WIDTH + offset, dtype=dtype)[offset:].view(2, 5, -1)
    vector = torch.zeros(WIDTH, dtype=norm_dtype or dtype)
    through_triton.clear()
    STUB.records = []
    epilogue.add_norm(x, y, None, None, (vector, vector, 1e-5))
    return STUB.records[-1]


def direct() -> bool:
    """Launch `add_norm`; true if it did not go through triton."""
    call()
    return not through_triton


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def observe() -> dict[str, Any]:
    kernel: Any = epilogue._add_norm_kernel
    seen: dict[str, Any] = {"version": triton.__version__}
    first = call()
    seen["first"] = bool(through_triton)
    again = call()
    seen["again"] = bool(through_triton)
    # Grid, stream and handles, then tensors, then numbers and constants; hooks and their metadata are None or empty.
    pointers = [isinstance(argument, torch.Tensor) for argument in first.arguments]
    seen["alike"] = [
        (first.kernel, first.signature) == (again.kernel, again.signature),
        pointers == [isinstance(argument, torch.Tensor) for argument in again.arguments],
        all(
            one == other
            for place, (one, other) in enumerate(zip(first.arguments, again.arguments, strict=True))
            if not pointers[place] and place not in (6, 7, 8)
        ),
    ]

    wide = call(torch.float32)
    seen["other dtype"] = [bool(through_triton), wide.signature["x_ptr"], call().signature["x_ptr"], direct()]
    wide = call(norm_dtype=torch.float32)
    seen["other dtype of a norm"] = [bool(through_triton), wide.signature["weight_ptr"], call().signature["weight_ptr"]]

    unaligned = call(offset=1)
    seen["unaligned"] = [bool(through_triton), unaligned.attributes != again.attributes, direct()]

    STUB.device = 1
    call()
    other = [bool(through_triton), direct()]
    STUB.device = 0
    seen["other device"] = [*other, direct()]
    seen["tensors on another device"] = elsewhere(kernel)

    if hasattr(kernel, "device_caches"):
        kernel.device_caches.clear()
        seen["cleared"] = [not direct(), direct()]
        entered: list[Any] = []
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(entered.append)
        call()
        call()
        hooks.remove(entered.append)
        seen["hooks"] = [len(entered), [entry.get()["name"] for entry in entered], direct()]
        with changed(kernel, "pre_run_hooks", [lambda *arguments, **options: entered.clear()]):
            call()
        seen["kernel hook"] = [len(entered), direct()]
        with changed(triton.knobs.runtime, "debug", True):
            seen["debug"] = [direct(), direct()]
    for name, owner, attribute, value in (
        ("untried", launch, "TRIED", ((0, 0), (0, 1))),
        ("amd", STUB, "target", GPUTarget("hip", "gfx942", 64)),
    ):
        epilogue._add_norm_launch.cache_clear()
        call()
        epilogue._add_norm_launch.cache_clear()
        with changed(owner, attribute, value):
            seen[name] = [direct(), direct()] if hasattr(kernel, "device_caches") else [False, False]
    return seen


def elsewhere(kernel: Any) -> Any:
    """Launch on tensors of device 1 while device 0 is current: the devices of the launches, and the current one."""

    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 1

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, STUB.device = STUB.device, self.index

        def __exit__(self, *exception: Any) -> None:
            STUB.device = self.before

    tensors = [torch.zeros(2, 5, WIDTH, dtype=torch.bfloat16).as_subclass(Elsewhere) for _ in range(8)]
    made: Callable[..., None] = epilogue._add_norm_launch(10 * WIDTH, WIDTH, False, False, True, 1e-5)
    devices: list[int] = []
    stream = STUB.get_current_stream
    with (
        changed(torch.cuda, "device", Device),
        changed(torch.cuda, "device_of", lambda tensor: Device(tensor.get_device())),
        changed(STUB, "get_current_stream", lambda device: devices.append(device) or stream(device)),
    ):
        made(*tensors)
        made(*tensors)
    return [devices, STUB.device]


def layouts(offset: int = 0) -> dict[str, list[Callable[[], object]]]:
    """Calls of every launcher, by operation, that differ in sizes, strides, dtypes, options or flags.

    offset: elements by which tensors are moved from a multiple of 16 bytes.
    """

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)

    def qkv(tokens: int = 9, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        return list(tensor(2, tokens, 96, dtype=dtype).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0))

    x, strided, longer = tensor(2, 9, WIDTH), tensor(2, 9, 2 * WIDTH)[..., :WIDTH], tensor(2, 13, WIDTH)
    (q, k, v), size, norm = qkv(), tensor(2, 9, dtype=torch.float32), (tensor(WIDTH), tensor(WIDTH), 1e-5)
    dense = [part.contiguous() for part in (q, k, v)]
    scores, heads = tensor(2, 8, dtype=torch.float32), tensor(2, 2, 8, dtype=torch.float32)
    match, fewer = ([torch.zeros(2, n, dtype=torch.int64) for n in (5 - r, r, r)] for r in (3, 2))
    wide_norm = (norm[0].float(), norm[1].float(), 1e-6)
    mixer = [tensor(*shape) for shape in ((16,), (16,), (16, 9), (16,), (9, 16), (9,), (16,), (16,), (128, 16), (128,))]
    mixer += [tensor(*shape) for shape in ((16, 128), (16,), (16,), (1,))]
    support, offsets = tensor(40, 64), torch.tensor([0, 20, 40])
    text, pooled, weights = tensor(3, WIDTH), tensor(2, WIDTH), tensor(2, 9, dtype=torch.float32)
    teacher, projection, mask = tensor(2, 9, 40), tensor(40, WIDTH), tensor(2, 9, dtype=torch.bool)
    signs, order = tensor(18, 3, dtype=torch.int32), tensor(19, dtype=torch.int32)
    return {
        "attention": [
            lambda: attention.attention(q, k, v, None, None, 1),
            lambda: attention.attention(*dense, None, None, 1),
            lambda: attention.attention(q[:, :, :1], k, v, None, None, 1),
            lambda: attention.attention(q, k, v, size, None, 1),
            lambda: attention.attention(q, k, v, None, "cls", 1),
            lambda: attention.attention(q, k, v, None, "cls", 2),
            lambda: attention.attention(q, k, v, None, "received", 1),
            lambda: attention.attention(*qkv(13), None, None, 1),
            lambda: attention.attention(*qkv(dtype=torch.float32), None, None, 1),
        ],
        "rank": [
            lambda: rank.cls_scores(q, k, None, 1),
            lambda: rank.cls_scores(*dense[:2], None, 1),
            lambda: rank.cls_scores(q, k, size, 1),
            lambda: rank.reduce_scores(heads, False, 2),
            lambda: rank.reduce_scores(heads, True, 2),
        ],
        "prune": [
            lambda: prune.prune_tokens(x, scores, 5, False, "mean", 1, None),
            lambda: prune.prune_tokens(strided, scores, 5, False, "mean", 1, None),
            lambda: prune.prune_tokens(x, heads, 5, False, "mean", 1, None),
            lambda: prune.prune_tokens(x, heads, 5, True, "rank", 1, norm),
            lambda: prune.prune_tokens(x, heads, 5, True, "rank", 1, wide_norm),
            lambda: prune.prune_tokens(x, scores, 4, True, "mean", 1, norm),
        ],
        "match": [
            lambda: merge.match_tokens(k, 3, 1),
            lambda: merge.match_tokens(dense[1], 3, 1),
            lambda: merge.match_tokens(k, 2, 1),
            lambda: merge.match_tokens(k, 3, 0),
            lambda: merge.match_tokens(x, 3, 1),
            lambda: merge.match_tokens(longer, 3, 1),
        ],
        "merge": [
            lambda: merge.merge_tokens(x, *match, None, None),
            lambda: merge.merge_tokens(strided, *match, None, None),
            lambda: merge.merge_tokens(x, *match, size, norm),
            lambda: merge.merge_tokens(x, *match, size.to(torch.int64), norm),
            lambda: merge.merge_tokens(x, *fewer, None, wide_norm),
        ],
        "condense": [
            lambda: condense.condense_tokens(x, heads, 2, 4, 2, None, "rank", 1, 0, None),
            lambda: condense.condense_tokens(strided, heads, 2, 4, 2, None, "rank", 1, 0, None),
            lambda: condense.condense_tokens(x, heads, 3, 4, 2, heads, "mean", 1, 0, norm),
            lambda: condense.condense_tokens(x, scores, 2, 4, 2, scores, "mean", 1, 1, wide_norm),
        ],
        "epilogue": [
            lambda: epilogue.bias_act(x, norm[0], "gelu"),
            lambda: epilogue.bias_act(longer, norm[0], "gelu"),
            lambda: epilogue.bias_act(x, None, "gelu_tanh"),
            lambda: epilogue.add_norm(x, x, norm[0], norm[1], norm),
            lambda: epilogue.add_norm(x, x.float(), None, norm[1], wide_norm),
        ],
        "predict": [
            lambda: predict.predict_scores(x, mixer, 1e-5, 1),
            lambda: predict.predict_scores(strided, mixer, 1e-5, 1),
            lambda: predict.predict_scores(x, mixer, 1e-6, 0),
        ],
        "affinity": [
            lambda: affinity.affinity(tensor(3, 64), support, offsets, 5.5, None),
            lambda: affinity.affinity(tensor(3, 128)[:, :64], support, offsets, 5.5, None),
            lambda: affinity.affinity(tensor(3, 64), support, offsets, 1.0, tensor(40)),
            lambda: affinity.affinity(tensor(3, 64), tensor(600, 64), offsets, 5.5, None),
        ],
        "cross_attention": [
            lambda: cross_attention.attend(x, text, 0.5),
            lambda: cross_attention.attend(text, x, 0.5),
            lambda: cross_attention.attend(x[:, 1:], text, 0.5),
            lambda: cross_attention.attend(strided, text, 0.5),
            lambda: cross_attention.attend(x, text, 0.25),
            lambda: cross_attention.attend(x, tensor(66, WIDTH), 0.5),
            lambda: cross_attention.attend(x.float(), text.float(), 0.5),
            lambda: cross_attention.calip_terms(x, pooled, text, 0.5),
            lambda: cross_attention.calip_terms(x, tensor(2, 2 * WIDTH)[:, :WIDTH], text, 0.5),
            lambda: cross_attention.calip_terms(longer, pooled, text, 0.5),
            lambda: cross_attention.calip_terms(x.half(), pooled.half(), text.half(), 0.5),
        ],
        "targeted_l1": [
            lambda: targeted_l1.targeted_l1(x, teacher, projection, weights, mask, False),
            lambda: targeted_l1.targeted_l1(x, teacher, projection, weights, mask, True),
            lambda: targeted_l1.targeted_l1(strided, teacher, projection, weights, mask, True),
            lambda: targeted_l1.targeted_l1(x, teacher.float(), projection, weights.half(), mask, True),
            lambda: targeted_l1.targeted_l1(x, tensor(2, 9, 36), tensor(36, WIDTH), weights, mask, True),
            lambda: targeted_l1.targeted_l1(x.float(), teacher, projection.float(), weights, mask, True),
            lambda: targeted_l1.student_gradient(projection, weights, signs, order),
            lambda: targeted_l1.student_gradient(projection.half(), weights, signs, order),
            lambda: targeted_l1.projection_gradient(x, weights, signs, order, 40),
            lambda: targeted_l1.projection_gradient(strided, weights, signs, order, 40),
            lambda: targeted_l1.projection_gradient(x.float(), weights, signs, order, 40),
        ],
    }


def described(call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """The launches of a call: kernel, signature and arguments, tensors by their dtypes and strides."""
    STUB.records = []
    call()
    return [
        (
            *(record.kernel, record.signature, record.attributes),
            *(
                (argument.dtype, argument.shape, argument.stride()) if isinstance(argument, torch.Tensor) else argument
                for place, argument in enumerate(record.arguments)
                if place not in (6, 7, 8)  # the metadata of the launch, for its hooks
            ),
        )
        for record in STUB.records
    ]


def compare_layouts() -> dict[str, dict[str, bool]]:
    """By operation, whether its later launches are those that triton makes of the same calls."""
    compared = {}
    for (name, calls), unaligned in zip(layouts().items(), layouts(offset=1).values(), strict=True):
        through_triton.clear()
        expected = [alone(call) for call in calls]
        kernels = set(through_triton)
        expected_unaligned = [alone(call) for call in unaligned]
        forget_launches()
        for call in calls:
            call()
        through_triton.clear()
        same = [described(call) for call in reversed(calls)][::-1] == expected
        direct = not through_triton
        later_unaligned = [described(call) for call in unaligned]
        unaligned_same = later_unaligned == expected_unaligned and bool(through_triton)
        for kernel in kernels:
            kernel.device_caches.clear()
        through_triton.clear()
        cleared = [described(calls[0]), described(calls[0])] == [expected[0]] * 2
        cleared &= len(through_triton) == len(expected[0])
        hooks = calls_hooks(calls[0])
        compared[name] = {
            "same": same,
            "direct": direct,
            "unaligned": unaligned_same,
            "cleared": cleared,
            "hooks": hooks,
        }
    return compared


def alone(call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """The launches of a call that triton makes, because none is kept."""
    forget_launches()
    return described(call)


def calls_hooks(call: Callable[[], object]) -> bool:
    """True if each launch of a call enters a hook with the name of its kernel."""
    entered: list[Any] = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(entered.append)
    launches = described(call)
    hooks.remove(entered.append)
    return bool(launches) and [entry.get()["name"] for entry in entered] == [kernel for kernel, *_ in launches]


if __name__ == "__main__":
    count_runs()
    print(json.dumps(compare_layouts() if "--layouts" in sys.argv else observe()))
