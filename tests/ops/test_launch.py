"""Launches after a kernel's first hand the tensors to the compiled kernel, unless something has changed since."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = ["attention", "rank", "prune", "match", "merge", "condense", "epilogue", "predict", "affinity"]
OPERATIONS += ["cross_attention", "targeted_l1"]


def observe(*options: str) -> dict[str, Any]:
    """The observations of `launches.py`, made in a process without the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "ops" / "launches.py"), *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    observations: dict[str, Any] = json.loads(process.stdout)
    return observations


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return observe()


@pytest.fixture
def tried(seen: dict[str, Any]) -> dict[str, Any]:
    """The observations under a version of triton whose compiled kernels are called directly."""
    version = tuple(map(int, seen["version"].split(".")[:2]))
    if not (3, 6) <= version <= (3, 9):
        pytest.skip("under this version of triton every launch goes through JITFunction.run")
    return seen


def test_the_first_launch_goes_through_triton_and_the_next_do_not(tried: dict[str, Any]) -> None:
    assert (tried["first"], tried["again"]) == (True, False)


def test_a_later_launch_has_the_arguments_of_the_first(seen: dict[str, Any]) -> None:
    assert seen["alike"] == [True, True, True]


def test_another_dtype_has_a_kernel_of_its_own(tried: dict[str, Any]) -> None:
    assert tried["other dtype"] == [True, "*fp32", "*bf16", True]
    assert tried["other dtype of a norm"] == [True, "*fp32", "*bf16"]


def test_an_unaligned_tensor_has_a_kernel_of_its_own(tried: dict[str, Any]) -> None:
    assert tried["unaligned"] == [True, True, True]


def test_another_device_has_a_kernel_of_its_own(tried: dict[str, Any]) -> None:
    assert tried["other device"] == [True, True, True]


def test_a_launch_is_on_the_device_of_its_tensors(tried: dict[str, Any]) -> None:
    assert tried["tensors on another device"] == [[1, 1], 0]


def test_a_clear_of_tritons_cache_is_noticed(tried: dict[str, Any]) -> None:
    assert tried["cleared"] == [True, True]


def test_hooks_are_called_and_see_the_name_of_the_kernel(tried: dict[str, Any]) -> None:
    assert tried["hooks"] == [2, ["_add_norm_kernel", "_add_norm_kernel"], True]
    assert tried["kernel hook"] == [0, True]


def test_debugging_goes_through_triton(tried: dict[str, Any]) -> None:
    assert tried["debug"] == [False, False]


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """The launches of every operation in every layout, compared with triton's."""
    return observe("--layouts")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_later_launches_are_those_of_triton_for_every_layout(tried: dict[str, Any], compared: Any, name: str) -> None:
    assert compared[name] == {"same": True, "direct": True, "unaligned": True, "cleared": True, "hooks": True}


@pytest.mark.slow
def test_every_operation_has_layouts(tried: dict[str, Any], compared: dict[str, Any]) -> None:
    assert list(compared) == OPERATIONS


@pytest.mark.parametrize("case", ["untried", "amd"])
def test_an_untried_interface_is_not_used(seen: dict[str, Any], case: str) -> None:
    assert seen[case] == [False, False]
