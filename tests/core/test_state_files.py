"""State files: altered, hostile and older ones are refused in one line that names them."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clipkernels import formats, state_files
from clipkernels.artefacts.header import FORMAT as ARTEFACT
from clipkernels.evaluation import features as split_features
from clipkernels.evaluation import state as evaluation
from clipkernels.formats import Count, Format, Line, TensorSpec
from clipkernels.heads import reservoir_entries, tda_entries
from clipkernels.learn import calip_fs, tip_f
from clipkernels.learn.distill import TeacherCache, feature_files
from clipkernels.learn.patch_ranking import predictor, rankings, tokens
from clipkernels.learn.recovery import state as recovery
from clipkernels.methods import schedule
from clipkernels.state_files import read_state, tensor_digest, write_state
from clipkernels.support import features, manifest
from clipkernels.support.features import split_names
from clipkernels.tuning import state as tuning
from clipkernels.tuning.cost_table import FORMAT as COST
from tests.mutants import DEEP, Kind, mutants, read, write
from tests.state_kinds import KINDS, collection, golden, rank_predictor, reservoir, support_manifest, teacher_cache

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(kind: Kind) -> str:
    """The message of the error that a file is refused with: one short line that names it."""
    with pytest.raises(ValueError) as caught:
        kind.load()
    message = str(caught.value)
    assert str(kind.file) in message and "\n" not in message and len(message) < 600
    return message


FORMATS: dict[str, Format] = {
    **{"reservoir": reservoir_entries.FORMAT, "TDA": tda_entries.FORMAT},
    **{"predictor": predictor.FORMAT, "rankings": rankings.FORMAT},
    **{"Tip-Adapter-F": tip_f.FORMAT},
    **{"learnt tokens": tokens.FORMAT, "CALIP-FS": calip_fs.FORMAT, "features": features.FORMAT},
    **{"teacher": feature_files.FORMAT, "manifest": manifest.FORMAT, "artefact": ARTEFACT, "cost table": COST},
    "schedule": schedule.FORMAT,
    **{"recovery": recovery.RUN_FORMAT, "recovery targets": recovery.PART_FORMAT},
    **{"recovery checkpoint": recovery.CHECKPOINT_FORMAT, "recovery best": recovery.BEST_FORMAT},
    **{"evaluation": evaluation.RUN_FORMAT, "evaluation features": split_features.FORMAT},
    **{"evaluation score": evaluation.SCORE_FORMAT, "evaluation speed": evaluation.SPEED_FORMAT},
    **{"tuning": tuning.RUN_FORMAT, "tuning evaluation": tuning.EVALUATION_FORMAT, "tuning speed": tuning.SPEED_FORMAT},
}


@pytest.mark.parametrize("name", KINDS)
def test_two_hundred_mutants_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    kind.load()
    for mutant in mutants(kind, seed=0):
        try:
            refusal(kind)
        except BaseException as error:
            raise AssertionError(f"{mutant}: {error!r:.500}") from error
    kind.load()


@pytest.mark.parametrize("name", FORMATS)
def test_an_older_format_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, form = KINDS[name](tmp_path), FORMATS[name]
    stem, _, number = form.name.rpartition(".")
    header, tensors = read(kind.file)
    write(kind.file, {**header, "format": f"{stem}.{int(number) - 1}"}, tensors)
    older = f"with format '{stem}.{int(number) - 1}', which an older clipkernels wrote: delete it, then make it again"
    assert f"expected {form.title} ({form.name}), got" in refusal(kind) and older in refusal(kind)
    write(kind.file, {**header, "format": f"{stem}.{int(number) + 1}"}, tensors)
    assert "which a newer clipkernels wrote" in refusal(kind)


@pytest.mark.parametrize("name", ["reservoir", "CALIP-FS"])
def test_a_format_that_is_a_metadata_entry_is_older_too(name: str, tmp_path: Path) -> None:
    kind, form = KINDS[name](tmp_path), FORMATS[name]
    older = form.name.replace(".2", ".1")
    save_file(read(kind.file)[1], kind.file, {"format": older, "scale": "100.0"})
    assert f"with format '{older}', which an older clipkernels wrote" in refusal(kind)
    save_file(read_tensors(kind.file), kind.file)
    assert "with format None: its metadata is empty, not clipkernels" in refusal(kind)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118


def hostile(file: Path, form: str) -> None:
    """Write a file that claims or holds too much."""
    header, tensors = read(file)
    nested = "[" * 10_000 + "]" * 10_000
    texts = {"deep": nested, "deep field": json.dumps(header)[:-1] + f',"x":{nested}}}'}
    if form in texts:
        save_file(tensors, file, {"clipkernels": texts[form]})
    elif form == "long":
        text = b" " * 100_000_000
        file.write_bytes(len(text).to_bytes(8, "little") + text)
    elif form == "claim":
        file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    else:  # empty tensors with sizes beyond 64 bits
        sizes = [0, (1 << 62)] if form == "sizes" else [(1 << 62), (1 << 62), 0]
        text = json.dumps({"unit": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 0]}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize("form", ["deep", "deep field", "long", "claim", "sizes", "overflow"])
def test_a_hostile_file_takes_neither_memory_nor_recursion(form: str, tmp_path: Path) -> None:
    kind = reservoir(tmp_path)
    hostile(kind.file, form)
    tracemalloc.start()
    start = time.perf_counter()
    refusal(kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and time.perf_counter() - start < 5


def test_a_hostile_manifest_takes_neither_memory_nor_recursion(tmp_path: Path) -> None:
    kind = support_manifest(tmp_path)
    kind.file.write_text('{"format": ' + "[" * 10_000 + "]" * 10_000 + "}")
    assert "nested too deeply" in refusal(kind)
    with kind.file.open("w") as file:
        file.truncate(100_000_000)
    assert "which is larger than 64 MiB" in refusal(kind)
    kind.file.write_text("[" + "[]," * 1_500_000 + "[]]")
    tracemalloc.start()
    assert "JSON of more than 2097152 values" in refusal(kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    kind = rank_predictor(tmp_path)
    kind.file.unlink()
    os.mkfifo(kind.file)
    assert "which is not a regular file" in refusal(kind)


class Named(msgspec.Struct, forbid_unknown_fields=True):
    count: Count
    name: Line


SMALL = Format(
    "clipkernels.small.1",
    "a small file",
    Named,
    lambda header: {"x": TensorSpec((torch.float32,), "count rows*", -1, 1)},
)


def test_digests_are_of_names_dtypes_shapes_bytes_and_header(tmp_path: Path) -> None:
    file, x = tmp_path / "small", torch.tensor([[0.5, -1.0]])
    write_state(file, SMALL, {"name": "ż\udcff", "count": 1}, {"x": x})
    with safe_open(file, "pt") as stored:
        header = json.loads(stored.metadata()["clipkernels"])
    expected = sha256(b'["x", "F32", [1, 2]]' + x.numpy().tobytes()).hexdigest()
    assert header["tensors"] == {"x": expected} == {"x": tensor_digest("x", x)}
    fields = '{"count":1,"format":"clipkernels.small.1","name":"\\u017c\\udcff","tensors":{"x":"' + expected + '"}}'
    assert header["sha256"] == sha256(fields.encode()).hexdigest()
    assert read_state(file, SMALL)[0] == {"name": "ż\udcff", "count": 1}
    assert len({tensor_digest("x", t) for t in (x, x.T, x.flatten(), x.half(), x.int().bool())} | {expected}) == 5


def test_what_cannot_be_read_cannot_be_written(tmp_path: Path) -> None:
    file, good = tmp_path / "small", {"name": "a", "count": 1}
    write_state(file, SMALL, good, {"x": torch.zeros(1, 0)})
    before = file.read_bytes()
    wrong: list[tuple[dict[str, Any], torch.Tensor, str]] = [
        ({**good, "count": -1}, torch.zeros(1, 2), "Expected `int` >= 0 - at `$.count`"),
        ({**good, "more": 1}, torch.zeros(1, 2), "unknown field `more`"),
        ({"count": 1}, torch.zeros(1, 2), "missing required field `name`"),
        ({**good, "name": "x" * (1 << 17)}, torch.zeros(1, 2), "length <= 65536"),
        (good, torch.full((1, 2), float("nan")), "infinite or NaN values in x"),
        (good, torch.full((1, 2), 1.5), "the value 1.5 in x instead of numbers from -1 to 1"),
        (good, torch.zeros(1, 2).double(), "x in F64 instead of F32"),
        (good, torch.zeros(2, 2), r"x of shape (2, 2) instead of (1, rows*)"),
        (good, torch.zeros(1), r"x of shape (1) instead of (1, rows*)"),
        (good, torch.zeros(1, 2, dtype=torch.complex64), "x in None instead of F32"),
    ]
    for header, x, reason in wrong:
        with pytest.raises(ValueError, match="expected a small file to write to") as caught:
            write_state(file, SMALL, header, {"x": x})
        assert reason in str(caught.value)
    with pytest.raises(ValueError, match="no x"):
        write_state(file, SMALL, good, {})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["small"]


def test_a_part_is_read_and_checked_alone(tmp_path: Path) -> None:
    kind = collection(tmp_path)
    data, table = kind.file.read_bytes(), read(kind.file)[1]["features"].numpy().tobytes()
    place = data.index(table)
    kind.file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    header, tensors = read_state(kind.file, features.FORMAT, ("paths", "sha256"))
    assert header["folder"] == ".." and split_names(tensors["paths"]) == ["a.png", "b/c.png", "d\udcff.png"]
    assert "another features than was written (its SHA-256 differs): delete it, then make it again" in refusal(kind)
    assert set(read_state(kind.file, features.FORMAT, copy=False, trusted=True)[1]) == {"features", "paths", "sha256"}


def test_a_teachers_file_is_hashed_once_when_it_is_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, hashed = teacher_cache(tmp_path), []
    monkeypatch.setattr(state_files, "tensor_digest", lambda name, x: hashed.append(name) or tensor_digest(name, x))
    monkeypatch.setattr("clipkernels.learn.distill.cache.MAX_MAPPED_FILES", 0)
    about = read(kind.file)[0]["teacher"]
    teacher: Any = SimpleNamespace(stamp=(1,), joined=None, about={k: v for k, v in about.items() if k != "dtype"})
    cache = TeacherCache(tmp_path, teacher, torch.float32)
    assert hashed == ["sha256"]
    first, again = cache.read(["b"]), cache.read(["b"])
    assert sorted(hashed) == ["sha256", "sha256", "text", "words", "words_mask"] and torch.equal(first.text, again.text)


@pytest.mark.parametrize("column", ["ranks", "unit"])
def test_values_that_contradict_each_other_are_refused(column: str, tmp_path: Path) -> None:
    kind = golden(tmp_path) if column == "ranks" else reservoir(tmp_path)
    header, tensors = read(kind.file)
    if column == "ranks":
        for number in (-5, 30000):
            write(kind.file, header, {**tensors, "ranks": torch.full_like(tensors["ranks"], number)})
            assert f"the value {number} in ranks instead of numbers from 0 to 3" in refusal(kind)
        write(kind.file, header, {**tensors, "ranks": torch.zeros_like(tensors["ranks"])})
        assert "3 of 3 rows of ranks that repeat a rank" in refusal(kind)
        return
    changes: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "arrival": ({"arrival": tensors["arrival"].clamp(max=0)}, "two entries with one arrival"),
        "entropy": ({"entropy": tensors["entropy"].flip(1)}, "not in order of entropy"),
        "large": ({"entropy": tensors["entropy"] + 2}, "more than that of 3 classes"),
        "mixed": ({"mean": tensors["mean"].double()}, "entries of several dtypes"),
    }
    for change, reason in changes.values():
        write(kind.file, header, {**tensors, **change})
        assert reason in refusal(kind)
    write(kind.file, {**header, "seen": 3}, tensors)
    assert "in arrival instead of numbers from -1 to 2" in refusal(kind)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("reservoir", "predictor", "rankings"):
        (tmp_path / name).mkdir()
    one, other, third = (KINDS[name](tmp_path / name) for name in ("reservoir", "predictor", "rankings"))
    shutil.copy(other.file, one.file)
    assert "with format 'clipkernels.rank_predictor.2'" in refusal(one)
    header, tensors = read(third.file)
    write(other.file, header, tensors)
    assert "with format 'clipkernels.rankings.2'" in refusal(other)
    write(other.file, {**header, "format": DEEP}, tensors)
    assert "expected a predictor (clipkernels.rank_predictor.2), got" in refusal(other)


def test_limits_leave_room_for_large_sets() -> None:
    # A thousand classes of a hundred images, each with a digest, a file and a source, and fifty sentences per class.
    image = '{"sha256": "' + "a" * 64 + '", "file": "0000-abcdefgh.jpg", "source": "' + "p" * 100 + '"},\n'
    assert 1000 * (100 * (len(image) + 12) + 50 * 80) < manifest.MAX_BYTES
    assert 1000 * (100 * image.count(",") + 50) < formats.MAX_HEADER_ITEMS


def test_a_file_that_cannot_be_made_is_named_by_the_error(tmp_path: Path) -> None:
    file = tmp_path / "none" / "state"
    with pytest.raises(FileNotFoundError) as raised:
        write_state(file, SMALL, {"name": "a", "count": 1}, {"x": torch.zeros(1, 2)})
    assert raised.value.filename == str(file)
