"""`clipkernels check`: correct operations pass and wrong ones fail, in every format."""

import csv
import io
import json
import sys

import pytest
import torch

from clipkernels import custom_ops
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import check_against_fp64, flat
from clipkernels.testing.inputs import InputFactory, Shape
from tests.cli import commands
from tests.cli.commands import error

CPU = torch.device("cpu")


def run(*arguments):
    return commands.run("check", *arguments)


@pytest.fixture
def interpreted(triton, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels were not imported for the interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def _sweep():
    """One operation of each kind, the others slow, because every kernel has its own test file."""
    for op in CASES:
        quick = op in ("prune_tokens", "bias_act_gelu")
        yield pytest.param(op, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("op", list(_sweep()))
def test_every_operation_passes_in_the_interpreter(interpreted, op):
    result = run("--ops", op, "--precision", "fp32", "--precision", "bf16", "--interpret", "--format", "json")
    rows = json.loads(result.stdout)["rows"]
    assert result.exit_code == 0 and {row["verdict"] for row in rows} == {"ok"}
    assert {row["backend"] for row in rows} == {"triton"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}


def test_without_a_gpu_or_the_interpreter_the_reference_is_checked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = run("--device", "cpu", "--ops", "prune_tokens,merge", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.exit_code == 0, result.output
    assert {row["backend"] for row in rows} == {"reference"} and {row["verdict"] for row in rows} == {"ok"}
    assert f"{len(rows)} of {len(rows)} passed on cpu" in result.stderr


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda run: lambda *a: run(*a)._replace(tokens=run(*a).tokens * 1.01), "result 0 is off by"),
        (lambda run: lambda *a: run(*a)._replace(index=run(*a).index.flip(1)), "choice 1 differs from the reference's"),
    ],
    ids=["values", "choices"],
)
def test_a_wrong_kernel_fails_with_exit_status_one(interpreted, monkeypatch, spoil, verdict):
    monkeypatch.setattr(custom_ops.prune, "prune_tokens", spoil(custom_ops.prune.prune_tokens))
    result = run("--ops", "prune_tokens", "--precision", "fp32", "--interpret", "--format", "json")
    assert result.exit_code == 1
    assert any(row["verdict"].startswith(verdict) for row in json.loads(result.stdout)["rows"])


def test_a_kernel_that_depends_on_batch_or_run_fails(interpreted, monkeypatch):
    launch, calls = custom_ops.epilogue.bias_act, []

    def drifts(x, bias, act):
        calls.append(1)
        return launch(x, bias, act) + (1e-7 if len(calls) % 2 else 0)

    monkeypatch.setattr(custom_ops.epilogue, "bias_act", drifts)
    result = run("--ops", "bias_act_gelu_tanh", "--precision", "fp32", "--interpret", "--format", "json")
    assert result.exit_code == 1
    assert {row["verdict"] for row in json.loads(result.stdout)["rows"]} == {"a second run gives other bits"}
    monkeypatch.setattr(custom_ops.epilogue, "bias_act", lambda x, b, act: launch(x, b, act) + 1e-7 * (len(x) - 1))
    result = run("--ops", "bias_act_gelu_tanh", "--precision", "fp32", "--interpret", "--format", "json")
    assert {row["verdict"] for row in json.loads(result.stdout)["rows"]} == {"the last image alone gives other bits"}


def test_a_kernel_that_does_not_launch_fails(interpreted, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of shared memory\nat line 1")

    monkeypatch.setattr(custom_ops.epilogue, "bias_act", fails)
    result = run("--ops", "bias_act_gelu", "--precision", "fp16", "--interpret")
    assert result.exit_code == 1 and "out of shared memory" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "error: expected a device of this machine, got 'cuda:99'"),
        (["--ops", "sort"], "error: expected --ops among attention, attention_sized"),
        (["--interpret", "--device", "cuda"], "error: expected --device cpu with --interpret, got cuda"),
    ],
)
def test_a_check_that_cannot_run_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert error(run(*arguments)).startswith(message)


def test_interpret_starts_a_process_with_the_variable_set(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.argv", ["clipkernels", "check", "--interpret", "--precision", "fp32"])
    called = {}

    def call(command, env):
        called.update(command=command, env=env)
        return 1

    monkeypatch.setattr(sys.modules["clipkernels.cli.check"].subprocess, "call", call)
    assert run("--interpret", "--precision", "fp32").exit_code == 1
    assert called["command"][1:] == ["-m", "clipkernels", "check", "--interpret", "--precision", "fp32"]
    assert called["env"]["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_the_reference_is_within_its_own_budget(op, dtype):
    source = InputFactory(Shape(21, 128, 2, 1, 4), 2, dtype, CPU)
    inputs = CASES[op].inputs(source)
    verdict = check_against_fp64(
        CASES[op], source, inputs, flat(CASES[op].call(source, "reference", *inputs)), "reference"
    )
    assert verdict.fault is None and verdict.error == verdict.reference_error <= verdict.allowed
