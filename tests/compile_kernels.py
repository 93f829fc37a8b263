"""Compile the kernels ahead of time, with no GPU, and print the targets that came through without spilled bytes."""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from clipkernels.kernels import prune
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
ONE = ((196, 768),)
ALL = ((49, 768), (196, 768), (256, 1024), (576, 1024), (1023, 1792))
HEADS = 12


def main() -> None:
    shapes = ALL if "--all" in sys.argv else ONE
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for name in pool.map(compile_for, TARGETS, [shapes] * len(TARGETS)):
            print(name)


def compile_for(name: str, shapes: tuple[tuple[int, int], ...]) -> str:
    """The target's name once every kernel came through for it."""
    target = TARGETS[name]
    for patches, width in shapes:
        blocks = prune.config(patches, width)
        warps = blocks.pop("num_warps")
        shape = {"BLOCK_P": blocks["BLOCK_P"], "BLOCK_J": blocks["BLOCK_J"]}
        for dtype in ("fp32", "bf16"):
            floats = {"x_ptr": dtype, "tokens_ptr": dtype, "normed_ptr": dtype}
            for fuse in (False, True):
                constants = {"C": width, "FUSE": fuse, "NORM": True, **blocks}
                build(prune._prune_kernel, floats, constants, target, warps)
        for rank in (False, True):
            build(prune._heads_kernel, {}, {"H": HEADS, "RANK": rank, **shape}, target, warps)
    return name


def build(
    kernel: triton.JITFunction, floats: dict[str, str], constants: dict[str, object], target: GPUTarget, warps: int
) -> None:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, floats) for n in names}
    # What the launcher adds for aligned pointers.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    spilled = _spilled(compiled.asm)
    assert spilled == 0, f"{kernel.__name__} spills {spilled} bytes on {target} with {constants}"


def _type(name: str, floats: dict[str, str]) -> str:
    if name.endswith("_ptr"):
        return "*i64" if name == "index_ptr" else f"*{floats.get(name, 'fp32')}"
    return "fp32" if name == "eps" else "i32"


def _spilled(asm: dict[str, object]) -> int:
    """Bytes of stack, or spilled vector registers on AMD."""
    if "amdgcn" in asm:
        return sum(
            int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", asm["amdgcn"])
        )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"STACK:(\d+)", usage))


if __name__ == "__main__":
    main()
