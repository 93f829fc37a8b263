"""Compile the kernels ahead of time, with no GPU, exactly as the launchers launch them.

    python tests/compile_kernels.py                                # one tower, sm_90 and gfx942
    python tests/compile_kernels.py --all --write                  # bench/results/compiled-<triton's version>.csv
    python tests/compile_kernels.py --all --write --kernels rank   # its rows of that table; the others stay
    python tests/compile_kernels.py --towers H-14 --targets sm_80 --kernels attention

Every launcher is called on meta tensors at the shapes of CLIP towers with a recorder in place of the launch, and the
recorded launches are compiled for each target. Exit status 1 if a kernel exceeds its budget, needs more shared memory
than the target has, or lacks the wide loads and matrix instructions it is designed for.

Compilers differ, so each version of triton has its own table, whose figures are the budgets under that version:
stack, spilled and shared memory of a kernel may reach its row and no more. Without a row, and for a new table, a kernel
may take 64 bytes of stack.

Stack and spills are bytes of one thread, read from the compiled code. The stack is the size of the frame. Spills are
the widths of all instructions that store into it, each counted once, as in the log of `ptxas -v`.

Instructions are of the first launch of each kernel, the one with the fewest options: those of its program, those of its
longest innermost loop, and how many of the loop's (without a loop, of the program's) a thread takes per element.
"""

import argparse
import ast
import csv
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipkernels.kernels import (
    affinity,
    attention,
    condense,
    cross_attention,
    epilogue,
    merge,
    predict,
    prune,
    rank,
    targeted_l1,
)

KERNELS = Path(prune.__file__).parent
TABLE = Path(__file__).parents[2] / "bench" / "results" / f"compiled-{triton.__version__}.csv"
# Bytes of stack that a kernel without a row in the table may take.
STACK = 64
# The version of triton whose table has every tower.
NEWEST = "3.9.0"
# Target, bytes of shared memory that one program may take.
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
}
# Tokens, width, heads, prefix: every head width of CLIP towers, short and long, whole and reduced lengths.
TOWERS = {
    "B-16": (197, 768, 12, 1),
    "B-32": (50, 768, 12, 1),
    "L-14": (257, 1024, 16, 1),
    "L-14-336": (577, 1024, 16, 1),
    "SO400M-14-384": (729, 1152, 16, 0),
    "H-14": (257, 1280, 16, 1),
    "g-14": (257, 1408, 16, 1),
    "PE-bigG-14-448": (1024, 1536, 16, 0),
    "bigG-14": (257, 1664, 16, 1),
    "e-14": (257, 1792, 16, 1),
    "B-16 at 138": (138, 768, 12, 1),
    "B-16 at 72": (72, 768, 12, 1),
    "H-14 at 50": (50, 1280, 16, 1),
    "L-14-280": (401, 1024, 16, 1),
}
# The others' tables have these, because a sweep of all towers takes more than an hour on two cores.
COMMON_TOWERS = ["B-16", "L-14", "L-14-336", "SO400M-14-384", "B-16 at 138", "B-16 at 72"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SIZES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SIZES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
# Required in the PTX for half-precision inputs: loads of 16 bytes, and matrix instructions.
WIDE_LOADS = {
    "_affinity_kernel",
    "_attend_kernel",
    "_attention_kernel",
    "_gather_kernel",
    "_cluster_kernel",
    "_condense_kernel",
    "_merge_kernel",
    "_bias_act_kernel",
    "_add_norm_kernel",
    "_cls_kernel",
    "_predict_kernel",
    "_distance_kernel",
    "_student_kernel",
    "_projection_kernel",
}
MATRIX = {"_affinity_kernel", "_attend_kernel", "_attention_kernel", "_predict_kernel"}
MATRIX |= {"_distance_kernel", "_student_kernel", "_projection_kernel"}
# The constants whose product is the number of elements that one turn of the inner loop, or a program without a loop,
# computes: logits, products of a key, activations.
ELEMENTS = {
    "_attention_kernel": ("BLOCK_M", "BLOCK_N"),
    "_cls_kernel": ("BLOCK_N", "BLOCK_D"),
    "_bias_act_kernel": ("BLOCK_R", "BLOCK_C"),
}
# The most instructions per logit of 64 channels in half precision, on sm_90, of programs with 128 queries. Up to 64
# queries, whose keys are one tile, the loop does not run.
PER_LOGIT = 8.0
# A student's and a teacher's width without wide loads: every element has its own address.
NARROW = (771, 515)


class CompiledKernel(NamedTuple):
    """The resources and instructions of one compiled launch; stack and spilled in bytes of a thread.

    Instructions are counted for the first launch of a kernel only.
    """

    kernel: str
    configuration: str
    registers: int
    shared: int
    stack: int
    spilled: int
    wide_loads: bool
    matrix: str
    program: int = 0
    loop: int = 0
    per_element: float = 0.0


def main() -> None:
    arguments = parse()
    jobs = [
        (target, tower, dtype, arguments.kernels)
        for target in arguments.targets
        for tower in arguments.towers
        for dtype in arguments.dtypes
    ]
    digests = hashes()  # before the workers read the sources
    others = other_rows(arguments.kernels, arguments.towers, digests) if arguments.write and arguments.kernels else []
    # A new table is not held to the one it replaces.
    budgets = {} if arguments.write else read_budgets()
    rows, faults, count, start = [], [], 0, time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for number, kernels in enumerate(pool.map(compile_for, *zip(*jobs, strict=True)), 1):
            target, tower, dtype, _ = jobs[number - 1]
            rows += [{"target": target, "tower": tower, "dtype": dtype, **row} for row in summarize(kernels)]
            faults += [
                f"{kernel.kernel} on {target}, {tower}, {dtype}: {fault} ({kernel.configuration})"
                for kernel in kernels
                for fault in find_faults(kernel, target, dtype, budgets.get((target, tower, dtype, kernel.kernel)))
            ]
            count += len(kernels)
            seconds = time.monotonic() - start
            print(f"[{number}/{len(jobs)}] {seconds:4.0f} s  {target} {tower} {dtype}", file=sys.stderr, flush=True)
    if arguments.write:
        places = {name: place for names in (TARGETS, TOWERS, DTYPES) for place, name in enumerate(names)}
        columns = ("target", "tower", "dtype")
        rows = sorted(others + rows, key=lambda row: (*(places[row[column]] for column in columns), row["kernel"]))
        write(rows, arguments.towers, digests)
    print(f"{count} kernels compiled for {' '.join(arguments.targets)} with triton {triton.__version__}")
    if faults:
        sys.exit("\n".join(faults))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90", "gfx942"])
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=["B-16"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--kernels", nargs="+", default=[], metavar="STEM", help="files of kernels/; default all")
    parser.add_argument("--all", action="store_true", help="every target and dtype, and the towers of the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help=f"write the table of this triton, {TABLE.name}")
    arguments = parser.parse_args()
    if arguments.all:
        towers = list(TOWERS) if triton.__version__ == NEWEST else COMMON_TOWERS
        arguments.targets, arguments.towers, arguments.dtypes = list(TARGETS), towers, list(DTYPES)
    return arguments


def launches(tower: str, dtype: torch.dtype) -> None:
    """Calls every launcher at a tower's shapes, with all of its optional inputs and with none."""
    n, width, h, prefix = TOWERS[tower]
    b, d = 8, width // h
    patches, keep, r = n - prefix, (n - prefix) * 7 // 10, n // 15

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, wide = empty(b, n, width), empty(b, n, 4 * width)
    q, k, v = empty(b, n, 3 * width).unflatten(-1, (3, h, d)).permute(2, 0, 3, 1, 4)
    norm, vector, size = (empty(width), empty(width), 1e-5), empty(width), empty(b, n, dtype=torch.float32)
    scores, per_head = empty(b, patches, dtype=torch.float32), empty(b, h, patches, dtype=torch.float32)
    index = [empty(b, count, dtype=torch.int64) for count in ((n + 1) // 2 - r, r, r)]
    for sized in (None, size):
        for signal in (None, "cls", "received"):
            attention.attention(q, k, v, sized, signal, prefix)
        attention.attention(q, k, None, sized, "received", prefix)
        attention.attention(q[:, :, :1], k, v, sized, None, prefix)
        rank.cls_scores(q, k, sized, prefix)
    for by_rank in (False, True):
        rank.reduce_scores(per_head, by_rank, h)
    for g, ht, hc in ((64, 32, 256), (64, 64, 1024), (64, 64, 128), (16, 16, 128)):
        token, channel = ((ht, n), (ht,), (n, ht), (n,)), ((hc, g), (hc,), (g, hc), (g,))
        weights = [empty(*size) for size in ((g,), (g,), *token, (g,), (g,), *channel, (g,), (1,))]
        predict.predict_scores(x, weights, 1e-5, prefix)
    for fuse in (False, True):
        prune.prune_tokens(x, scores, keep, fuse, "mean", prefix, None)
        prune.prune_tokens(x, per_head, keep, fuse, "mean", prefix, norm)
        prune.prune_tokens(x, per_head, keep, fuse, "rank", prefix, norm)
    m = patches + 1 - math.ceil(0.9 * patches)
    for centers in (2, 4):
        counts = (patches + 1 - 3 * m, 2 * m, centers)
        condense.condense_tokens(x, scores, *counts, None, "mean", prefix, 0, None)
        condense.condense_tokens(x, per_head, *counts, None, "mean", prefix, 0, norm)
        condense.condense_tokens(x, per_head, *counts, per_head, "rank", prefix, 0, norm)
    merge.match_tokens(k, r, prefix)
    merge.match_tokens(empty(b, n, d), r, prefix)
    merge.match_tokens(x, r, prefix)
    half = [empty(b, count, dtype=torch.int64) for count in ((n + 1) // 2 - patches // 2, patches // 2, patches // 2)]
    merge.merge_tokens(x, *half, size, norm)
    for sized in (None, size):
        merge.merge_tokens(x, *index, sized, None)
        merge.merge_tokens(x, *index, sized, norm)
    for act in ("quick_gelu", "gelu", "gelu_tanh"):
        epilogue.bias_act(wide, empty(4 * width), act)
    epilogue.bias_act(wide, None, "quick_gelu")
    epilogue.add_norm(x, x, None, None, None)
    epilogue.add_norm(x, x, vector, None, norm)
    epilogue.add_norm(x, x, vector, vector, norm)
    # Embeddings are 512 to 1024 wide; the CLS tokens of twelve blocks are also compared.
    embedding = {768: 512, 1024: 768, 1152: 1152}.get(width, 1024)
    offsets, weights = empty(1001, dtype=torch.int64), empty(50_000, dtype=torch.float32)
    affinity.affinity(empty(b, embedding), empty(1000, embedding), offsets, 5.5, None)
    affinity.affinity(empty(b, embedding), empty(50_000, embedding), offsets, 5.5, weights)
    affinity.affinity(empty(b, 12 * width), empty(3000, 12 * width), offsets, 5.0, weights[:3000])
    affinity.affinity(empty(b, embedding), empty(64, embedding), offsets[:3], 5.5, None)
    visual, text = empty(b, patches, embedding), empty(1000, embedding)
    cross_attention.calip_terms(visual, empty(b, embedding), text, 0.5)
    cross_attention.attend(visual, text, 0.5)
    cross_attention.attend(text, visual, 0.5)
    importance, mask = empty(b, n, dtype=torch.float32), empty(b, n, dtype=torch.bool)
    for d, e in ((width, embedding), *([NARROW] if tower == "B-16" else [])):
        student, teacher, projection = empty(b, n, d), empty(b, n, e), empty(e, d)
        targeted_l1.targeted_l1(student, teacher, projection, importance, mask, False)
        _, signs, order = targeted_l1.targeted_l1(student, teacher, projection, importance, mask, True)
        targeted_l1.student_gradient(projection, importance, signs, order)
        targeted_l1.projection_gradient(student, importance, signs, order, e)


def compile_for(target: str, tower: str, dtype: str, stems: list[str]) -> list[CompiledKernel]:
    """Every kernel that a tower launches in a dtype, compiled for a target."""
    records: dict[str, tuple[triton.JITFunction, dict[str, object], dict[str, object]]] = {}

    def record(kernel: triton.JITFunction, *arguments: object, **named: object) -> None:
        names = kernel.arg_names
        values = {**dict(zip(names, arguments, strict=False)), **{n: v for n, v in named.items() if n in names}}
        options = {n: named[n] for n in ("num_warps", "num_stages", "enable_fp_fusion") if n in named}
        records.setdefault(
            f"{kernel.__name__} {[describe(v) for v in values.values()]} {options}", (kernel, values, options)
        )

    triton.JITFunction.run = record
    cross_attention.shared_memory = lambda device: TARGETS[target][1]
    attention.is_hopper = lambda device: target == "sm_90"
    launches(tower, DTYPES[dtype])
    compiled: dict[str, list[CompiledKernel]] = {}
    for kernel, values, options in records.values():
        if not stems or Path(kernel.fn.__code__.co_filename).stem in stems:
            counted = kernel.__name__ not in compiled
            built = build(kernel, values, options, TARGETS[target][0], counted)
            compiled.setdefault(kernel.__name__, []).append(built)
    return [kernel for kernels in compiled.values() for kernel in kernels]


def describe(value: object) -> object:
    """The part of an argument that decides the code."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if isinstance(value, (str, bool)) or value is None else (type(value), value)


def build(
    kernel: triton.JITFunction, values: dict[str, object], options: dict[str, object], target: GPUTarget, counted: bool
) -> CompiledKernel:
    """One launch, compiled as triton's own launcher would specialise it; its instructions only if `counted`."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value, key = values[parameter.name], (place,)
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[key] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[key] = f"*{SIZES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[key] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        code = binary.asm["amdgcn"]
        registers, stack, stores = (
            int(re.search(rf"\.{field}:\s*(\d+)", code)[1])
            for field in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        spilled = 4 * stores  # each stores one register of 32 bits
        program, loop = count_instructions(code) if counted else (0, 0)
        wide, matrix = "dwordx4" in code or "_b128" in code, "mfma" * ("v_mfma" in code)
    else:
        ptx = binary.asm["ptx"]
        registers, stack, sass = resources(binary.asm["cubin"], counted)
        spilled = spill_stores(sass)
        program, loop = count_instructions(sass) if counted else (0, 0)
        wide = bool(re.search(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.c[ag][.\w]* \[[^]]*\], \[[^]]*\], 0x10", ptx))
        matrix = " ".join(sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))))
    constants = {kernel.arg_names[place]: value for (place,), value in constants.items()}
    elements = math.prod(constants[name] for name in ELEMENTS.get(kernel.__name__, ()))
    threads = target.warp_size * options["num_warps"]
    return CompiledKernel(
        kernel=kernel.__name__,
        configuration=" ".join(f"{name}={value}" for name, value in (constants | options).items()),
        registers=registers,
        shared=binary.metadata.shared,
        stack=stack,
        spilled=spilled,
        wide_loads=wide,
        matrix=matrix,
        program=program,
        loop=loop,
        per_element=round((loop or program) * threads / elements, 2) if kernel.__name__ in ELEMENTS else 0.0,
    )


def resources(cubin: bytes, disassemble: bool) -> tuple[int, int, str]:
    """Registers and bytes of stack of a thread, and the disassembly if there is a stack or it is asked for."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        registers, stack = int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])
        # Disassembling takes as long as compiling.
        return registers, stack, dump("-sass") if stack or disassemble else ""


def spill_stores(sass: str) -> int:
    """The total bytes written by instructions that store to a thread's stack, each counted once."""
    widths = re.findall(r"\bSTL(?:\.[A-Z]+)*(?:\.[US]?(\d+))?(?:\.[A-Z]+)* ", sass)
    return sum(int(bits) // 8 if bits else 4 for bits in widths)


def count_instructions(code: str) -> tuple[int, int]:
    """The instructions of a disassembled program, and of its longest innermost loop; 0 without a loop.

    A loop is a branch to an earlier instruction: to an address in NVIDIA's code, a label in AMD's. A branch back from
    code behind the program's end, where rare cases lie, is none.
    """
    places: dict[str, int] = {}
    branches, ends, count = [], [], 0
    for line in code.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            places[match[1]] = count
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);|\t([a-z]+_.*)", line):
            if match[1]:
                places[f"0x{int(match[1], 16):x}"] = count
            if branch := re.search(r"\bBRA\b.*(0x[0-9a-f]+)|s_c?branch\w*\s+(\.LBB\w+)", match[2] or match[3]):
                branches.append((count, branch[1] or branch[2]))
            if re.match(r"EXIT|RET|s_endpgm", match[2] or match[3]):
                ends.append(count)
            count += 1
    loops = [(places[target], at) for at, target in branches if places.get(target, at) < at]
    loops = [(start, end) for start, end in loops if not any(start <= end_of_program < end for end_of_program in ends)]
    inner = [
        (start, end) for start, end in loops
        if not any(start <= first and last <= end for first, last in loops if (first, last) != (start, end))
    ]  # fmt: skip
    return count, max((end - start + 1 for start, end in inner), default=0)


def summarize(kernels: list[CompiledKernel]) -> list[dict[str, object]]:
    """One row per kernel: its configurations, the most that any of them takes, and the instructions of the first."""
    table = []
    for name in sorted({record.kernel for record in kernels}):
        records = [record for record in kernels if record.kernel == name]
        figures = ("registers", "shared", "stack", "spilled")
        most = {key: max(getattr(record, key) for record in records) for key in figures}
        matrix = " ".join(sorted({record.matrix for record in records} - {""}))
        wide = all(record.wide_loads or is_narrow(record) for record in records)
        counts = {key: getattr(records[0], key) or "" for key in ("program", "loop", "per_element")}
        row = {"kernel": name, "configurations": len(records), **most, "wide_loads": wide, "matrix": matrix}
        table.append(row | counts)
    return table


def is_narrow(kernel: CompiledKernel) -> bool:
    """True for a launch whose rows cannot be loaded 16 bytes at a time."""
    return "D={} E={} ".format(*NARROW) in kernel.configuration


def read_budgets() -> dict[tuple[str, str, str, str], dict[str, int]]:
    """The committed figures of this triton by target, tower, dtype and kernel; none where it has no table."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {
        (row["target"], row["tower"], row["dtype"], row["kernel"]): {
            column: int(row[column]) for column in ("stack", "spilled", "shared")
        }
        for row in rows
    }


def other_rows(stems: list[str], towers: list[str], digests: dict[str, str]) -> list[dict[str, object]]:
    """The committed rows of kernels that are not in the files `stems`; an exit if they are not of these sources."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    header = dict(line[2:].split(maxsplit=1) for line in lines if line.startswith("# "))
    changed = [stem for stem, digest in digests.items() if stem not in stems and header.get(stem) != digest]
    if changed or not header["towers"].endswith(": " + ", ".join(towers)):
        sys.exit(
            f"{TABLE.name} is of other towers, or of other sources of {' '.join(changed)}: write it without --kernels"
        )
    compiled = {
        name for stem in stems for name, value in vars(sys.modules[f"clipkernels.kernels.{stem}"]).items()
        if isinstance(value, triton.JITFunction) and Path(value.fn.__code__.co_filename).stem == stem
    }  # fmt: skip
    return [row for row in csv.DictReader(line for line in lines if not line.startswith("#"))
            if row["kernel"] not in compiled]  # fmt: skip


def find_faults(kernel: CompiledKernel, target: str, dtype: str, budget: dict[str, int] | None) -> list[str]:
    """The ways in which a kernel exceeds its budget or the target, or misses its design."""
    source = f"in {TABLE.name}" if budget else f"without a row in {TABLE.name}"
    faults = [
        f"{column} of {getattr(kernel, column)} bytes, budget {allowed} {source}"
        for column, allowed in (budget or {"stack": STACK}).items()
        if getattr(kernel, column) > allowed
    ]
    if kernel.shared > TARGETS[target][1]:
        faults.append(f"shared of {kernel.shared} bytes, {TARGETS[target][1]} on the target")
    if dtype != "fp32" and kernel.kernel in WIDE_LOADS and not kernel.wide_loads and not is_narrow(kernel):
        faults.append("no loads of 16 bytes")
    if dtype != "fp32" and kernel.kernel in MATRIX and not kernel.matrix:
        faults.append("no matrix instructions")
    logits = kernel.kernel == "_attention_kernel" and re.search(r"\bD=64 .*\bBLOCK_M=128 ", kernel.configuration)
    if target == "sm_90" and dtype != "fp32" and logits and kernel.per_element > PER_LOGIT:
        faults.append(f"{kernel.per_element} instructions per logit, at most {PER_LOGIT}")
    return faults


def hashes() -> dict[str, str]:
    """A hash of the code of each file with kernels; docstrings, comments and the order of imports do not change it."""
    sources = {file.stem: file.read_text(encoding="utf-8") for file in sorted(KERNELS.glob("*.py"))}
    return {stem: code_hash(source) for stem, source in sources.items() if "@triton.jit" in source}


def code_hash(source: str) -> str:
    """A hash of a module's lines of code, the same under every Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    tree = ast.parse(source)
    skipped: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    documented = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef))
    skipped += [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    for node in skipped:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def write(rows: list[dict[str, object]], towers: list[str], digests: dict[str, str]) -> None:
    """Writes the table, headed by the version of triton, the towers and the hashes of the sources."""
    partial = TABLE.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        file.write(f"# towers {len(towers)} of {len(TOWERS)}: {', '.join(towers)}\n")
        file.writelines(f"# {stem} {digest}\n" for stem, digest in digests.items())
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(TABLE)


if __name__ == "__main__":
    main()
