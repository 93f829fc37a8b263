"""Every kernel compiles for every target within its budget, and the committed tables of that are up to date."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLES = {
    path.stem.removeprefix("compiled-"): path.read_text(encoding="utf-8").splitlines()
    for path in sorted((ROOT / "bench" / "results").glob("compiled-*.csv"))
}
# Bytes of spill stores that a table may have: none on gfx942, and none on sm_90 except these by version and kernel.
NVIDIA_SPILLS = 32
# Before version 3.9 triton takes CUDA 12's ptxas for sm_90, which saves registers at the price of a few stores.
SM_90_SPILLS = {
    "3.6.0": {"_attend_kernel": 4, "_attention_kernel": 16, "_cluster_kernel": 32, "_merge_kernel": 8},
    "3.8.0": {
        "_affinity_kernel": 16,
        "_attend_kernel": 4,
        "_cls_kernel": 4,
        "_distance_kernel": 16,
        "_merge_kernel": 4,
    },
}


def run_compile_kernels(*options: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(
        "triton", "3.4", reason="no triton from 3.4 on is installed; earlier ones cannot compile the kernels"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "ops" / "compile_kernels.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def compile_kernels() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    from tests.ops import compile_kernels

    return compile_kernels


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        ("sm_90", ["bf16", "fp32"]),
        ("gfx942", ["bf16"]),
        pytest.param("gfx942", ["fp32"], marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_within_its_budgets(target: str, dtypes: list[str]) -> None:
    process = run_compile_kernels("--targets", target, "--dtypes", *dtypes)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"kernels compiled for {target}" in process.stdout


@pytest.mark.slow
def test_the_widest_and_the_longest_tower_compile_for_every_target() -> None:
    process = run_compile_kernels(
        "--towers", "e-14", "PE-bigG-14-448", "--targets", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942", timeout=3600
    )
    assert process.returncode == 0, process.stdout + process.stderr


def compiled_kernel(compile_kernels: ModuleType, stack: int = 0, spilled: int = 0, shared: int = 0) -> tuple[Any, ...]:
    return compile_kernels.CompiledKernel("_cls_kernel", "D=64", 40, shared, stack, spilled, wide_loads=True, matrix="")


@pytest.mark.parametrize("column", ["stack", "spilled", "shared"])
def test_a_kernel_with_a_row_may_take_that_and_no_more(compile_kernels: ModuleType, column: str) -> None:
    budget = {"stack": 16, "spilled": 8, "shared": 256}
    most = compiled_kernel(compile_kernels, **budget)
    assert compile_kernels.find_faults(most, "sm_90", "bf16", budget) == []
    more = compiled_kernel(compile_kernels, **{**budget, column: budget[column] + 1})
    expected = f"{column} of {budget[column] + 1} bytes, budget {budget[column]} in {compile_kernels.TABLE.name}"
    assert compile_kernels.find_faults(more, "sm_90", "bf16", budget) == [expected]


def test_a_kernel_without_a_row_may_take_64_bytes_of_stack(compile_kernels: ModuleType) -> None:
    assert compile_kernels.find_faults(compiled_kernel(compile_kernels, 64, 128, 1024), "sm_90", "bf16", None) == []
    (fault,) = compile_kernels.find_faults(compiled_kernel(compile_kernels, 72), "sm_90", "bf16", None)
    assert fault == f"stack of 72 bytes, budget 64 without a row in {compile_kernels.TABLE.name}"


def test_the_target_and_the_design_bind_with_and_without_a_row(compile_kernels: ModuleType) -> None:
    kernel = compiled_kernel(compile_kernels, shared=65537)._replace(kernel="_attention_kernel", wide_loads=False)
    expected = [
        "shared of 65537 bytes, 65536 on the target",
        "no loads of 16 bytes",
        "no matrix instructions",
    ]
    for budget in (None, {"stack": 0, "spilled": 0, "shared": 65537}):
        assert compile_kernels.find_faults(kernel, "gfx942", "bf16", budget) == expected


def test_spill_stores_are_counted_by_their_widths(compile_kernels: ModuleType) -> None:
    sass = """
        /*05e0*/                   STL [R1], R9 ;                /* 0x0000000901007387 */
        /*05f0*/              @!P0 STL.64 [R1+0x8], R10 ;        /* 0x0000080a01007387 */
        /*0600*/                   STL.128 [R1+0x10], R12 ;      /* 0x0000100c01007387 */
        /*0610*/                   STL.U8 [R1+0x20], R16 ;       /* 0x0000201001007387 */
        /*18b0*/                   LDL.LU R29, [R1] ;            /* 0x00000000011d7983 */
        /*18c0*/                   STG.E.128 [R2.64], R4 ;       /* 0x0000000402007986 */
    """
    assert compile_kernels.spill_stores(sass) == 4 + 8 + 16 + 1


def test_instructions_of_nvidia_code_are_counted_by_program_and_loop(compile_kernels: ModuleType) -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe20000000f00 */
        /*0010*/                   MOV R2, RZ ;                  /* 0x000000ff00027202 */
        /*0020*/                   MOV R3, RZ ;                  /* 0x000000ff00037202 */
        /*0030*/                   FADD R4, R4, R2 ;             /* 0x0000000204047221 */
        /*0040*/                   IADD3 R3, R3, 0x1, RZ ;       /* 0x0000000103037810 */
        /*0050*/               @P0 BRA 0x30 ;                    /* 0xffffffc000f40947 */
        /*0060*/               @P1 BRA 0x90 ;                    /* 0x0000000000041947 */
        /*0070*/                   IADD3 R2, R2, 0x1, RZ ;       /* 0x0000000102027810 */
        /*0080*/              @!P2 BRA 0x20 ;                    /* 0xffffffc000f40947 */
        /*0090*/                   STG.E [R6.64], R4 ;           /* 0x0000000406007986 */
        /*00a0*/                   EXIT ;                        /* 0x000000000000794d */
        /*00b0*/                   BRA 0x90 ;                    /* 0xfffffffc00fc7947 */
        /*00c0*/                   BRA 0xc0;                     /* 0xfffffffc00fc7947 */
    """
    assert compile_kernels.count_instructions(sass) == (13, 3)


def test_instructions_of_amd_code_are_counted_by_program_and_loop(compile_kernels: ModuleType) -> None:
    lines = [
        ".LBB0_0:",
        "\ts_mov_b32 s0, 0",
        "\t.p2align 8",
        ".LBB0_1:        ; =>This Inner Loop",
        "\tv_add_f32_e32 v0, v0, v1",
    ]
    lines += ["\ts_add_i32 s0, s0, 1", "\ts_cbranch_scc1 .LBB0_1", "; %bb.2:", "\ts_cbranch_execz .LBB0_4", ".LBB0_3:"]
    lines += ["\ts_endpgm", ".LBB0_4:", "\tv_mov_b32_e32 v0, 0", "\ts_branch .LBB0_3"]
    assert compile_kernels.count_instructions("\n".join(lines)) == (8, 3)


def test_a_logit_may_take_eight_instructions_on_sm_90(compile_kernels: ModuleType) -> None:
    record = compiled_kernel(compile_kernels)
    kernel = compile_kernels.CompiledKernel(*record)._replace(
        kernel="_attention_kernel", configuration="D=64 OUT=True BLOCK_M=128 BLOCK_N=64", matrix="wgmma.mma_async"
    )
    assert compile_kernels.find_faults(kernel._replace(per_element=8.0), "sm_90", "bf16", None) == []
    (fault,) = compile_kernels.find_faults(kernel._replace(per_element=8.02), "sm_90", "bf16", None)
    assert fault == "8.02 instructions per logit, at most 8.0"


def test_a_table_is_committed_for_each_triton_with_exact_budgets() -> None:
    assert list(TABLES) == ["3.6.0", "3.8.0", "3.9.0"]


@pytest.mark.parametrize("version", TABLES)
def test_a_table_of_compiled_kernels_is_of_these_sources(compile_kernels: ModuleType, version: str) -> None:
    header = dict(line[2:].split(maxsplit=1) for line in TABLES[version] if line.startswith("# "))
    assert header.pop("triton") == version
    assert header.pop("towers")
    assert header == compile_kernels.hashes(), (
        f"run `make compile` with triton {version} and commit the table (CONTRIBUTING.md)"
    )


@pytest.mark.parametrize("version", TABLES)
def test_a_table_has_every_target_and_dtype_within_limits(version: str) -> None:
    rows = list(csv.DictReader(line for line in TABLES[version] if not line.startswith("#")))
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    limits = {"gfx942": 0, "sm_80": NVIDIA_SPILLS, "sm_89": NVIDIA_SPILLS, "sm_100": NVIDIA_SPILLS}
    for row in rows:
        limit = limits.get(row["target"], SM_90_SPILLS.get(version, {}).get(row["kernel"], 0))
        assert int(row["spilled"]) <= limit, row
