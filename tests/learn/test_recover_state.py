"""The state of a recovery: a run that was stopped or killed goes on with the same bits, other runs are refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipkernels as ck
from clipkernels.learn.recovery import Progress, recover, targets
from clipkernels.learn.recovery.state import FOLDER
from tests.learn.recovering import OPTIONS, noise, run, small_tower, state_of
from tests.learn.test_recover import same
from tests.subprocesses import without_xdist

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, torch.Tensor], Any]:
    """The weights and the result of a run without a state."""
    model = small_tower()
    result = run(model)
    return state_of(model), result


def test_a_run_that_is_stopped_everywhere_ends_with_the_same_bits(
    uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PART_ROWS", 8)
    model = small_tower()
    start, phases = state_of(model), Counter[str]()
    for _ in range(100):
        seen: list[Progress] = []

        def stop_at_the_second(progress: Progress, seen: list[Progress] = seen) -> bool:
            seen.append(progress)
            return len(seen) == 2

        result = run(model, state=tmp_path / "state", progress=stop_at_the_second)
        phases[seen[-1].phase] += 1
        if not result.stopped:
            break
        assert same(state_of(model), start) and ck.method_of(model) is None and result.after is None
    assert phases.total() > 10 and phases["embedding"] and phases["training"]
    weights, expected = uninterrupted
    assert same(state_of(model), weights) and result == expected


def test_a_finished_state_gives_its_result_again(uninterrupted: Any, tmp_path: Path) -> None:
    weights, expected = uninterrupted
    for _ in range(2):
        model, phases = small_tower(), Counter[str]()
        assert run(model, state=tmp_path / "s", progress=lambda p: phases.update([p.phase])) == expected  # noqa: B023
        assert same(state_of(model), weights)
    assert not phases


def test_another_run_than_the_states_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    run(small_tower(), state=folder, epochs=1)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    options = {**OPTIONS, "epochs": 1, "state": folder}
    for change, message in (
        ({"epochs": 2}, "got one with epochs 1 instead of 2: repeat that call, or choose another state"),
        ({"lr": 2e-4, "seed": 3}, "got one with lr 0.001 instead of 0.0002, seed 1 instead of 3"),
        ({"method": ck.ToMe(2)}, r"got one with method EViT\(keep=0.5, .*\) instead of ToMe\(r=2"),
        ({"lora": 1}, "got one with lora None instead of 1"),
        ({"held_out": 0.15}, "got one with held_out 6 instead of 0.15"),
        ({"images": noise(39)}, "got one with images 40 instead of 39"),
        ({"images": noise().flip(0)}, r"the images that the run began with, got another images\["),
        ({"model": ck.bundled()[0]}, "got one with another tower, another plan"),
    ):
        arguments = {"model": small_tower(), "images": noise(), "method": ck.EViT(0.5), **options, **change}
        arguments["epochs"] = arguments["epochs"] if "images" not in change else 1
        if message.startswith(r"the images"):
            (folder / "checkpoint.safetensors").unlink()  # otherwise no image is read any more
        with pytest.raises(ValueError, match=message):
            recover(arguments.pop("model"), arguments.pop("images"), **arguments)
    after = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    assert after == {name: content for name, content in before.items() if name in after}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("")
    for call in (lambda: run(small_tower(), state=tmp_path), lambda: FOLDER.remove(tmp_path)):
        with pytest.raises(ValueError, match=r"expected state to be a new or empty folder, .*'photo.png'"):
            call()
    with pytest.raises(ValueError, match="which is no folder"):
        run(small_tower(), state=tmp_path / "photo.png")
    assert os.listdir(tmp_path) == ["photo.png"]
    folder = tmp_path / "state"
    run(small_tower(), state=folder, epochs=1)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    FOLDER.remove(folder)
    FOLDER.remove(folder)
    assert not folder.exists()


def test_only_one_process_uses_a_state(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    def second(progress: Progress) -> None:
        with pytest.raises(ValueError, match="to have one writer"):
            run(small_tower(), state=folder)

    run(small_tower(), state=folder, epochs=1, batch_size=40, progress=second)


def test_the_best_weights_and_no_others_are_on_disk(tmp_path: Path) -> None:
    result = run(small_tower(), state=tmp_path / "s")
    names = sorted(name for name in os.listdir(tmp_path / "s"))
    assert names == [f"best-{result.best_step}.safetensors", "checkpoint.safetensors", "run.json",
                     "targets-0.safetensors"]  # fmt: skip
    FOLDER.check(tmp_path / "s")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(small_tower(), state=tmp_path / "s", epochs=1)
    file = tmp_path / "s" / "checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    model = small_tower()
    with pytest.raises(ValueError, match="expected a checkpoint of a recovery"):
        run(model, state=tmp_path / "s", epochs=1)
    assert same(state_of(model), state_of(small_tower()))


def kill_at(moments: list[float], folder: Path, pause: float) -> tuple[int, Path]:
    """Kill a recovery after each number of seconds since it started, then let it end; returns the kills."""
    command = [
        sys.executable,
        "-m",
        "tests.learn.recovering",
        str(folder / "state"),
        str(folder / "weights"),
        str(pause),
    ]
    options: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    kills = 0
    for moment in moments:
        with subprocess.Popen(command, env=without_xdist(os.environ), **options) as process:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            time.sleep(moment)
            kills += process.poll() is None
            process.kill()
    subprocess.run(command, check=True, env=without_xdist(os.environ), **options)
    return kills, folder / "weights"


def test_a_killed_run_ends_with_the_same_bits(uninterrupted: Any, tmp_path: Path) -> None:
    kills, weights = kill_at([0.3, 0.9], tmp_path, 0.05)
    assert kills >= 1 and same(load_file(weights), uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_often_ends_with_the_same_bits(uninterrupted: Any, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    kills, weights = kill_at([generator.uniform(0.0, 0.8) for _ in range(8)], tmp_path, 0.05)
    assert kills >= 3 and same(load_file(weights), uninterrupted[0])
