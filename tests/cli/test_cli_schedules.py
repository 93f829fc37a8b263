"""The verbs with `--method schedule.json`: the file of a schedule in place of a method's spelling."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

import clipkernels as ck
from clipkernels.cli.parts.methods import methods_for, read_methods
from clipkernels.data import digits
from tests.cli.commands import error, run, save_a_digit_per_class, succeed

SCHEDULE = ck.Schedule((ck.Merge(9), None, ck.Prune(30), None, ck.Merge(3), None), 65)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of the quick demo's digits, one per class, in a folder per class."""
    return save_a_digit_per_class(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a schedule for the bundled tower."""
    SCHEDULE.save(tmp_path / "schedule.json")
    return tmp_path / "schedule.json"


def test_a_path_that_ends_in_json_is_a_schedule(file: Path) -> None:
    assert read_methods([str(file), "tome:8"], None, None) == [SCHEDULE, ck.ToMe(8)]
    other = ck.Schedule((ck.Merge(9), None, ck.Prune(30), None, ck.Merge(4), ck.Prune(27)), 65)
    alike = ck.Schedule((ck.Merge(8), None, ck.Prune(30), None, ck.Merge(3), None), 65)
    for name, schedule in (("other", other), ("alike", alike)):
        schedule.save(file.with_name(f"{name}.json"))
    specs = [str(file.with_name(f"{name}.json")) for name in ("schedule", "other", "alike")]
    rows = methods_for(ck.tower_of(ck.bundled()[0]), specs, None, None)
    assert list(rows.values()) == [None, ck.Dense(), SCHEDULE, other, alike]
    assert all(name.startswith("Schedule(65→") and len(name) < 26 for name in list(rows)[2:])


def test_a_file_that_cannot_be_read_is_one_line_that_names_it(file: Path, pictures: Path) -> None:
    common = ("classify", pictures, "--classes", "a,b", "--method")
    absent = file.with_name("absent.json")
    line = error(run(*common, absent))
    assert line == f"error: expected a file of ck.Schedule.save, got {absent}: No such file or directory"
    file.write_text(file.read_text().replace('"r": 9', '"r": 8'))
    expected = (
        f"error: expected a schedule of ck.Schedule.save (clipkernels.schedule.1), got {file} with another header"
    )
    assert error(run(*common, file)).startswith(expected)
    (file.parent / "folder.json").mkdir()
    assert str(file.parent / "folder.json") in error(run(*common, file.parent / "folder.json"))


@pytest.mark.parametrize("verb", ["classify", "bench", "show", "embed"])
def test_a_schedule_for_another_tower_is_refused(verb: str, file: Path, pictures: Path, tmp_path: Path) -> None:
    if verb == "embed":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    ck.Schedule((ck.Merge(9), None), 65).save(file)
    options = {
        "classify": ("--classes", "a,b"), "bench": ("--rounds", 1), "show": ("--out", tmp_path / "a.png"),
        "embed": ("--out", tmp_path / "out"),
    }  # fmt: skip
    line = run(verb, pictures, *options[verb], "--method", file).stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert line.endswith("the schedule is for 65 tokens, 1 of them prefix, and 2 blocks, got 65, 1 and 6")


def test_classify_bench_and_show_run_a_schedule(file: Path, pictures: Path, tmp_path: Path) -> None:
    result = succeed("classify", pictures, "--classes", ",".join(digits.CLASSES), "--method", file)
    assert str(SCHEDULE) in result.stderr
    options = ("--rounds", 1, "--limit", 4, "--method", file)
    rows = json.loads(succeed("bench", pictures, *options, "--format", "json").stdout)["rows"]
    assert [row["variant"] for row in rows] == ["dense (host)", "Dense()", str(SCHEDULE)]
    assert rows[2]["tokens"] == list(SCHEDULE.plan(65, 6).tokens)
    assert str(SCHEDULE) in succeed("bench", pictures, *options).stdout
    options = ("--limit", 2, "--method", file, "--out", tmp_path / "kept.png")
    shown = json.loads(succeed("show", pictures, *options, "--format", "json").stdout)
    assert {row["method"] for row in shown["rows"]} == {str(SCHEDULE)} and shown["rows"][0]["tokens"] == 29


def test_a_collection_keeps_the_schedule_when_its_file_is_gone(file: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    out, moved = tmp_path / "out", tmp_path / "moved.json"
    common = ("embed", pictures, "--out", out, "--workers", 0, "--method")
    assert f"note: {file} changes embeddings" in succeed(*common, file).stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["spec"] == str(file) and manifest["schedule"]["tokens"] == [65, 56, 56, 32, 32, 29, 29]
    assert manifest["settings"]["method"] == repr(SCHEDULE)
    shutil.move(file, moved)
    path = min(pictures.rglob("*.png"))
    found = succeed("search", out, "--image", path, "-k", 1, "--format", "json")
    assert json.loads(found.stdout)["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert found.stderr == f"1 hit in {out}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.search(out, image=path, k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert "0 images embedded" in succeed(*common, moved).stderr
    other = succeed("search", out, "--image", path, "-k", 1, "--method", "evit:0.5")
    assert "warning: the query is encoded with EViT(keep=0.5" in other.stderr
    ck.Schedule((*SCHEDULE.steps[:5], ck.Merge(1)), 65).save(file)
    refused = run(*common, file)
    assert refused.exit_code == 2 and " method: " in refused.stderr.splitlines()[-1]
