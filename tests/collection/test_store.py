"""The store of a collection: plans, units in any order, changes, errors, kills, full disks, damaged files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from clipkernels.collection.manifest import read_manifest
from clipkernels.collection.store import Counts, Diff, Store, plans, shards, units
from clipkernels.collection.store.shards import known_rows, read_errors, shard_numbers
from tests.collection.collections import (
    DIGEST,
    embedded,
    encode,
    expected,
    failed,
    listing,
    manifest,
    open_store,
    rows_of,
    run,
    schema,
    settings,
    tables,
)

NAMES = [f"{index:02d}.jpg" for index in range(23)]
ITEMS = dict.fromkeys(NAMES, 0)


def test_a_listing_is_embedded_once(tmp_path: Path) -> None:
    first, rest = run(tmp_path, ITEMS)
    assert (first.generation, first.new, first.resumed, first.sources) == (1, 23, False, ("photos",))
    assert rest.generation is None and embedded(tmp_path) == ITEMS and not failed(tmp_path)
    assert sorted(tables(tmp_path)) == [*(f"embeddings/0000{n}.parquet" for n in range(2)), "manifest.json"]
    assert run(tmp_path, ITEMS) == [Diff(None, unchanged=23)]
    with open_store(tmp_path) as store:
        assert store.counts == Counts(23, 0)


def test_a_shard_ends_with_the_unit_that_fills_it(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    filled = [shards.read_shard(tmp_path, number, settings(), schema()) for number in shards.shard_numbers(tmp_path)]
    assert [(shard.rows, shard.header.units) for shard in filled] == [(12, [(1, 0, 2)]), (11, [(1, 3, 5)])]


@pytest.mark.parametrize("seed", range(3))
def test_units_may_finish_in_any_order(tmp_path: Path, seed: int) -> None:
    run(tmp_path / "a", ITEMS, seed=99)
    run(tmp_path / "b", ITEMS, seed=seed)
    assert tables(tmp_path / "a") == tables(tmp_path / "b")


def test_units_move_to_a_shard_when_they_fill_it(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        diff = store.plan(listing(ITEMS))
        for unit in (0, 2, 3):
            encode(tmp_path, diff, unit)
            store.compact(final=False)
        assert store.pending() == [1, 4, 5] and not embedded(tmp_path)
        encode(tmp_path, diff, 1)
        store.compact(final=False)
        assert [*embedded(tmp_path)] == NAMES[:12] and store.pending() == [4, 5]
        store.compact(final=True)
        assert [*embedded(tmp_path)] == NAMES[:16] and store.pending() == [4, 5]
        assert not units.finished_units(tmp_path)


def test_the_open_shard_grows_in_a_later_generation(tmp_path: Path) -> None:
    run(tmp_path, NAMES[:5])
    run(tmp_path, NAMES[:7])
    assert [file.name for file in (tmp_path / "embeddings").iterdir()] == ["00000.parquet"]
    assert [*embedded(tmp_path)] == NAMES[:7]
    shard = shards.read_shard(tmp_path, 0, settings(), schema())
    assert shard.header.units == [(1, 0, 1), (2, 0, 0)] and shard.header.generation == 2


def test_a_changed_item_takes_the_place_of_its_row(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    later = {**ITEMS, NAMES[20]: 5, NAMES[3]: 6, NAMES[4]: 7}
    first, _ = run(tmp_path, later)
    assert (first.changed, first.new, first.unchanged) == (3, 0, 20)
    assert list(embedded(tmp_path).items()) == list(later.items())


def test_an_item_changes_into_an_error_and_back(tmp_path: Path) -> None:
    items = {"a?": 0, "b?": 1, "c": 0}
    for change in ({}, {"a?": 3, "b?": 3}, {"a?": 4, "b?": 3}, {"b?": 4}):
        items |= change
        run(tmp_path, items)
        assert (embedded(tmp_path), failed(tmp_path)) == expected(items)


@pytest.mark.parametrize("listed", [["a", "b", "c"], ["b"]])
@pytest.mark.parametrize("prune", [False, True])
def test_a_shard_that_was_copied_is_refused(listed: list[str], prune: bool, tmp_path: Path) -> None:
    run(tmp_path, ["a", "b", "c"])
    shards = tmp_path / "embeddings"
    (shards / "00001.parquet").write_bytes((shards / "00000.parquet").read_bytes())
    before = tables(tmp_path)
    with pytest.raises(ValueError, match="expected each id once in a collection, got 'a' in two of its files: delete"):
        run(tmp_path, listed, prune=prune)
    assert tables(tmp_path) == before


def test_errors_are_tried_again_when_asked(tmp_path: Path) -> None:
    items = {"a?": 1, "b": 0}
    run(tmp_path, items)
    assert run(tmp_path, items) == [Diff(None, failed=1, unchanged=1)]
    first, last = run(tmp_path, items, retry=True)
    assert (first.retried, first.unchanged, last.generation) == (1, 1, None)
    assert failed(tmp_path) == {"a?": 1}


def test_a_vanished_item_stays_unless_pruned(tmp_path: Path) -> None:
    items = {**ITEMS, "z?": 1, "y?": 1}
    run(tmp_path, items)
    rest = {name: time for name, time in items.items() if name not in (NAMES[0], NAMES[22], "z?")}
    assert run(tmp_path, rest) == [Diff(None, failed=1, unchanged=21, vanished=3)]
    assert embedded(tmp_path) == ITEMS
    first, _ = run(tmp_path, rest, prune=True)
    assert (first.dropped, first.vanished) == (3, 3)
    assert (embedded(tmp_path), failed(tmp_path)) == expected(rest)
    assert sorted(tables(tmp_path))[-1] == "manifest.json"
    assert run(tmp_path, rest, prune=True) == [Diff(None, failed=1, unchanged=21)]


def test_everything_may_vanish_and_come_back(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    run(tmp_path, [], prune=True)
    assert not embedded(tmp_path)
    run(tmp_path, ITEMS)
    assert embedded(tmp_path) == ITEMS


def test_an_empty_listing_has_no_plan(tmp_path: Path) -> None:
    assert run(tmp_path, []) == [Diff(None)]
    assert list(tables(tmp_path)) == ["manifest.json"]


def test_a_unit_may_hold_errors_alone(tmp_path: Path) -> None:
    items = {f"{index}?": 1 for index in range(9)}
    run(tmp_path, items)
    assert failed(tmp_path) == items and embedded(tmp_path) == {}
    assert run(tmp_path, items) == [Diff(None, failed=9)]
    run(tmp_path, {**items, "a": 0})
    assert embedded(tmp_path) == {"a": 0} and failed(tmp_path) == items


def test_content_tells_which_items_changed(tmp_path: Path) -> None:
    run(tmp_path, {**ITEMS, "z?": 1})
    calls: list[pa.Table] = []

    def changed(items: pa.Table) -> pa.Table:
        calls.append(items)
        return items.slice(2, 1)

    touched = dict.fromkeys(NAMES, 9)
    first, _ = run(tmp_path, {**touched, "z?": 1}, changed=changed)
    assert (first.changed, first.unchanged, first.failed) == (1, 22, 1)
    assert embedded(tmp_path) == {**ITEMS, NAMES[2]: 9}
    (items,) = calls
    assert items["id"].to_pylist() == NAMES and items["modified"].to_pylist() == [9] * 23
    assert items["sha256"].to_pylist() == rows_of(listing(ITEMS))["sha256"].to_pylist()


@pytest.mark.parametrize("later", [NAMES[:7], [*NAMES, "new.jpg"], {**ITEMS, NAMES[0]: 2, NAMES[9]: 2}, NAMES[8:]])
def test_an_unfinished_plan_is_finished_before_a_new_one(tmp_path: Path, later: Any) -> None:
    run(tmp_path / "whole", ITEMS)
    run(tmp_path / "whole", later, prune=True)
    with open_store(tmp_path / "killed") as store:
        diff = store.plan(listing(ITEMS))
        for unit in (4, 1):
            encode(tmp_path / "killed", diff, unit)
    resumed, *_, last = run(tmp_path / "killed", later, prune=True)
    assert (resumed.generation, resumed.resumed, resumed.new) == (1, True, 23) and last.generation is None
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


def test_a_store_writes_one_new_plan(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        diff = store.plan(listing({"a?": 1}), retry=True)
        assert store.plan(listing({"a?": 1}), retry=True)[:2] == (1, False)
        encode(tmp_path, diff, 0)
        store.compact(final=True)
        assert store.plan(listing({"a?": 1}), retry=True) == Diff(None)


def test_an_id_of_a_row_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    table = listing(NAMES)
    run(tmp_path, ITEMS)
    with open_store(tmp_path) as store, pytest.raises(ValueError, match=r"listed once, got '00.jpg' twice"):
        store.plan(pa.concat_tables([table, table.slice(0, 1)]))


def test_items_of_a_unit_keep_their_order_and_place(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.plan(listing(ITEMS))
        assert store.items(5).equals(listing(ITEMS).slice(20))
        with pytest.raises(ValueError, match="6 units and no unit 6"):
            store.items(6)


def test_known_rows_have_their_stamps(tmp_path: Path) -> None:
    run(tmp_path, {"a": 4, "b?": 1})
    columns = ["id", "size", "modified", "sha256"]
    [known] = known_rows(tmp_path, shard_numbers(tmp_path), columns, 1)
    errors, _ = read_errors(tmp_path)
    rows = [(row, failed) for table, failed in ((known, False), (errors, True)) for row in table.to_pylist()]
    assert [(row["id"], row["size"], row["modified"], failed) for row, failed in rows] == [
        ("a", 7, 4, False),
        ("b?", 7, 1, True),
    ]
    assert all(len(row["sha256"]) == 64 for row, _ in rows)


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    before = tables(tmp_path)
    other = manifest(method="ToMe(r=8)", precision="float16")
    expected_message = (
        f'expected the settings of {tmp_path}, got others: method: "host" became "ToMe(r=8)"; '
        'precision: "float32" became "float16": repeat its options, or choose another folder'
    )
    with pytest.raises(ValueError) as error, Store(tmp_path, other, schema(), 4):
        pass
    assert str(error.value) == expected_message and tables(tmp_path) == before and not (tmp_path / ".lock").exists()


def test_sources_of_all_runs_are_kept(tmp_path: Path) -> None:
    for names in (["b"], ["a", "b"]):
        run_manifest = manifest()
        run_manifest = type(run_manifest)(settings=settings(), sources=names, spec=None, run={})
        with Store(tmp_path, run_manifest, schema(), 4):
            pass
    assert read_manifest(tmp_path).sources == ["b", "a"]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with (
        pytest.raises(ValueError, match=r"with 'photo.jpg' and no manifest.json: choose another folder"),
        open_store(tmp_path),
    ):
        pass
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_a_lost_manifest_is_made_again_from_the_same_settings(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    before = tables(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="reader"), Store(tmp_path, manifest(reader="2"), schema(), 4):
        pass
    assert run(tmp_path, ITEMS) == [Diff(None, unchanged=23)] and tables(tmp_path) == before


def unfinished(folder: Path) -> None:
    """A collection with shards, an error, a plan and units."""
    run(folder, {**ITEMS, "z?": 1})
    with open_store(folder) as store:
        diff = store.plan(listing({**dict.fromkeys(NAMES, 2), "z?": 1, "new": 0}))
        for unit in store.pending()[:3]:
            encode(folder, diff, unit)


FILES = ("manifest.json", "plans/000002.parquet", "embeddings/00000.parquet", "errors/00000.parquet")


def place_of_data(file: Path) -> int:
    """The offset of a byte of an id."""
    group = pq.ParquetFile(file).metadata.row_group(0 if file.parent.name != "plans" else 4)
    return int(group.column(0).data_page_offset + group.column(0).total_compressed_size - 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "flipped"])
def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path, name: str, damage: str) -> None:
    unfinished(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[place_of_data(file) if file.suffix == ".parquet" else len(content) // 3] ^= 4
    file.write_bytes({"truncated": content[:-9], "empty": b"", "other": b"PAR1" * 99, "flipped": flipped}[damage])
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        run(tmp_path, ITEMS)
    assert "delete it, then make it again" in str(error.value) or name == "manifest.json"
    file.unlink()
    run(tmp_path, ITEMS)
    run(tmp_path, ITEMS)
    assert embedded(tmp_path).items() >= ITEMS.items()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other items"])
def test_a_damaged_unit_is_encoded_again(tmp_path: Path, damage: str) -> None:
    unfinished(tmp_path)
    file = units.unit_file(tmp_path, 2, 1)
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-3])
    elif damage == "flipped":
        file.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    else:
        units.write_unit(tmp_path, DIGEST, 2, 1, rows_of(listing(["a", "b", "c", "d"])))
    with open_store(tmp_path) as store:
        assert 1 not in store.pending()
        diff = store.plan(listing(ITEMS))
        assert diff.damaged == 1 and 1 in store.pending()
    run(tmp_path, ITEMS)
    assert embedded(tmp_path) == {**ITEMS, "new": 0}


def test_a_unit_of_other_items_enters_no_shard(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.plan(listing(NAMES[:4]))
        units.write_unit(tmp_path, DIGEST, 1, 0, rows_of(listing(NAMES[4:8])))
        with pytest.raises(ValueError, match=r"000001-00000.parquet with other items than the plan's"):
            store.compact(final=True)
    assert run(tmp_path, NAMES[:4])[0].damaged == 1
    assert [*embedded(tmp_path)] == NAMES[:4]


def test_a_unit_of_other_settings_enters_no_shard(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.plan(listing(NAMES[:4]))
        units.write_unit(tmp_path, settings(method="EViT(keep=0.7)").digest, 1, 0, rows_of(listing(NAMES[:4])))
        with pytest.raises(ValueError, match=r"000001-00000.parquet with other settings than the collection's"):
            store.compact(final=True)
    assert run(tmp_path, NAMES[:4])[0].damaged == 1
    assert [*embedded(tmp_path)] == NAMES[:4]


def test_a_shard_has_each_note_of_its_units_once(tmp_path: Path) -> None:
    for threads, items in (("1", listing(NAMES[:4])), ("2", listing(NAMES[:9])), ("3", listing({NAMES[0]: 2}))):
        with open_store(tmp_path) as store:
            diff = store.plan(items)
            assert diff.generation is not None
            for unit in store.pending():
                table = rows_of(store.items(unit))
                units.write_unit(tmp_path, DIGEST, diff.generation, unit, table, {"threads": threads})
            store.compact(final=True)
    shard = shards.read_shard(tmp_path, 0, settings(), schema())
    assert shard.rows == 9 and shard.header.notes == [{"threads": "1"}, {"threads": "2"}, {"threads": "3"}]


def test_a_plan_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The footer of a plan of ten million items takes 36 ms to read."""
    opened, read_head = [], plans.read_head
    monkeypatch.setattr(plans, "read_head", lambda *arguments: (opened.append(1), read_head(*arguments))[1])
    assert len(run(tmp_path, ITEMS)) == 2 and len(opened) == 1
    number = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    run(tmp_path, {**ITEMS, NAMES[0]: 2})
    assert len(opened) == 2
    assert not number or len(os.listdir("/proc/self/fd")) == number  # none is left open


def test_a_row_has_either_an_embedding_or_a_reason(tmp_path: Path) -> None:
    with open_store(tmp_path):
        table = rows_of(listing(["a"]))
        both = table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(["broken"]))
        with pytest.raises(ValueError, match="a row with both or neither"):
            units.write_unit(tmp_path, DIGEST, 1, 0, both)


def test_a_late_unit_of_an_earlier_generation_is_ignored(tmp_path: Path) -> None:
    run(tmp_path, ITEMS)
    units.write_unit(tmp_path, DIGEST, 1, 0, rows_of(listing(NAMES[:4])))
    units.write_unit(tmp_path, DIGEST, 2, 0, rows_of(listing(["x"])))
    assert run(tmp_path, [*NAMES, "new"])[0].new == 1
    assert embedded(tmp_path) == {**ITEMS, "new": 0}


def run_module(module: str, *arguments: Path | int) -> subprocess.CompletedProcess[str]:
    """Run a module in a process that imports the packages and forks."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[2])


def test_a_full_disk_or_folder_without_permission_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)  # for the user without permission
    result = run_module("tests.collection.refused_writes", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {"manifest", "plans", "units", "embeddings", "errors"} <= set(result.stdout.split())


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_a_kill_before_any_change_of_a_file_loses_nothing(tmp_path: Path, stride: int) -> None:
    result = run_module("tests.collection.kill_at_steps", tmp_path, stride)
    assert result.returncode == 0, result.stderr
    *everywhere, often = map(int, result.stdout.split())
    assert min(everywhere) > 100 // stride and often > 1
