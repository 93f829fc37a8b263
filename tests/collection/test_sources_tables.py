"""Parquet files and Hugging Face datasets as sources: columns of images, ids, other columns, and broken files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkernels.collection.sources import Listing, image_columns
from tests.collection.listings import (
    check_stamps,
    contents_of,
    fetch_all,
    ids_of,
    image_bytes,
    listing_of,
    write_images,
)

CHANGED = "its container changed since it was listed"
A, B, C = (image_bytes(shade) for shade in range(3))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes_has_ids_of_file_and_row(tmp_path: Path, kind: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", {"n": [1, 2, 3], "image": pa.array([A, None, C], kind)})
    listing = listing_of(tmp_path / "a.parquet")
    assert ids_of(listing) == ["a.parquet/0", "a.parquet/1", "a.parquet/2"]
    assert contents_of(listing) == [A, "no image in the table (null)", C]
    status = os.stat(tmp_path / "a.parquet")
    assert set(listing.table.column("size").to_pylist()) == {status.st_size}
    assert set(listing.table.column("modified").to_pylist()) == {status.st_mtime_ns}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_column_of_paths_is_relative_to_the_file(tmp_path: Path, kind: pa.DataType) -> None:
    contents = write_images(tmp_path, ["x/a.png", "x/y/b.png", "far.png"])
    paths = ["a.png", "y/b.png", str(tmp_path / "far.png"), "gone.png", None, "nul\0.png"]
    caption = pa.array(["a", "b", None, "", "e", "f"], kind)
    columns = {"caption": caption, "url": ["http://x/y.png"] * 6, "file": pa.array(paths).cast(kind)}
    write_parquet(tmp_path / "x" / "t.parquet", columns)
    listing = listing_of(tmp_path / "x" / "t.parquet", columns=["caption"])
    assert ids_of(listing) == [*paths[:4], "t.parquet/4", paths[5]] and listing.types == {"caption": pa.string()}
    missing = ["No such file or directory", "no image in the table (null)", "embedded null byte"]
    assert contents_of(listing) == [*contents, *missing]
    answers = fetch_all(listing, ["caption"])
    assert answers["a.png"].values == {"caption": "a"} and answers[str(tmp_path / "far.png")].values == {
        "caption": None
    }
    # The image's own stamp counts, because the row changes with it.
    status = os.stat(tmp_path / "x" / "a.png")
    assert (listing.table["size"][0].as_py(), listing.table["modified"][0].as_py()) == (
        status.st_size,
        status.st_mtime_ns,
    )
    assert (answers["a.png"].size, answers["a.png"].modified) == (status.st_size, status.st_mtime_ns)


def test_a_struct_as_datasets_writes_it(tmp_path: Path) -> None:
    write_images(tmp_path, ["far.png"])
    cells = [{"bytes": A, "path": "one.png"}, {"bytes": B, "path": None}, {"bytes": None, "path": "far.png"}]
    cells += [None, {"bytes": None, "path": None}]
    write_parquet(tmp_path / "a.parquet", {"image": cells, "label": [0, 1, 2, 3, 4]})
    listing = listing_of(tmp_path / "a.parquet", columns=["label"])
    assert ids_of(listing) == ["one.png", "a.parquet/1", "far.png", "a.parquet/3", "a.parquet/4"]
    nothing = "no image in the table (null)"
    assert contents_of(listing) == [A, B, (tmp_path / "far.png").read_bytes(), nothing, nothing]
    assert fetch_all(listing, ["label"])["far.png"].values == {"label": 2}
    check_stamps(Listing(listing.table.slice(0, 3), listing.sources, [], {}))


def test_a_parquet_file_of_datasets_is_read(tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    listing = listing_of(tmp_path / "a.parquet", columns=["label", "caption"])
    assert ids_of(listing) == ["0.png", "1.png", "2.png"] and contents_of(listing) == [A, B, C]
    assert listing.types == {"label": pa.int64(), "caption": pa.string()}
    assert fetch_all(listing, ["label", "caption"])["2.png"].values == {"label": 2, "caption": None}


def test_ids_come_from_a_column(tmp_path: Path) -> None:
    columns = {"image": [A, B, C], "n": [7, 8, 9], "s": pa.array(["x", "y", "z"]).dictionary_encode()}
    write_parquet(tmp_path / "a.parquet", {**columns, "null": ["x", None, "z"], "f": [0.1, 0.2, 0.3]})
    for column, ids in (("n", ["7", "8", "9"]), ("s", ["x", "y", "z"])):
        listing = listing_of(tmp_path / "a.parquet", id_column=column)
        assert ids_of(listing) == ids and contents_of(listing) == [A, B, C]
        check_stamps(listing)
    for column, message in (
        ("null", r"an id in each row, got null in 'null' of .*a\.parquet, row 1"),
        ("gone", r"a column of ids in .*a\.parquet \('image', 'n', 's', 'null', 'f'\), got 'gone'"),
        ("f", r"ids that are strings or integers in .*a\.parquet, got 'f' of double"),
    ):
        with pytest.raises(ValueError, match=message):
            listing_of(tmp_path / "a.parquet", id_column=column)


def test_the_column_of_images_is_found_or_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, {"a": [A], "b": [B], "n": [1]})
    with pytest.raises(ValueError, match=r"one column of images .*got 2: name one of 'a', 'b' by image_column"):
        listing_of(file)
    assert contents_of(listing_of(file, image_column="b")) == [B]
    with pytest.raises(ValueError, match=r"got 'n', of type int64"):
        listing_of(file, image_column="n")
    with pytest.raises(ValueError, match=r"got 'c', which is not there"):
        listing_of(file, image_column="c")
    write_parquet(file, {"text": ["no path"], "n": [1]})
    with pytest.raises(ValueError, match=r"got 0: name one of 'text', 'n' by image_column"):
        listing_of(file)


def test_folders_and_globs_of_parquet_files_are_one_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "train" / "0.parquet", {"image": [A, B]})
    write_parquet(tmp_path / "d" / "test" / "0.parquet", {"image": [C], "n": [1]})
    write_parquet(tmp_path / "d" / "none.parquet", {"image": pa.array([], pa.binary())})
    (tmp_path / "d" / "README.md").touch()
    for name in (tmp_path / "d", f"{tmp_path}/d/**/*.parquet"):
        listing = listing_of(name, columns=["n"])
        assert len(listing.sources) == 1
        assert ids_of(listing) == ["test/0.parquet/0", "train/0.parquet/0", "train/0.parquet/1"]
        assert contents_of(listing) == [C, A, B]
        assert [item.values for item in fetch_all(listing, ["n"]).values()] == [{"n": 1}, {"n": None}, {"n": None}]
    # Places stay the same when a file comes before the others.
    write_parquet(tmp_path / "d" / "a.parquet", {"image": [A]})
    later = listing_of(tmp_path / "d")
    assert later.table.column("place").to_pylist()[1:] == listing.table.column("place").to_pylist()
    (tmp_path / "d" / "x.tar").touch()
    with pytest.raises(ValueError, match="with Parquet files and tars"):
        listing_of(tmp_path / "d")
    with pytest.raises(ValueError, match="expected rows, got none in"):
        listing_of(tmp_path / "d" / "none.parquet")


def test_files_of_one_checksum_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipkernels.collection.sources import containers

    monkeypatch.setattr(containers, "crc32", lambda name: 5)
    for name, rows in (("a", [A, B]), ("b", [C])):
        write_parquet(tmp_path / f"{name}.parquet", {"image": rows})
    assert contents_of(listing_of(tmp_path)) == [A, B, C]


@pytest.mark.parametrize("rows", [5, 7, 1000])
def test_rows_are_fetched_in_any_order(tmp_path: Path, rows: int) -> None:
    contents = [b"%d" % number for number in range(100)]
    write_parquet(tmp_path / "a.parquet", {"image": contents}, row_group_size=rows)
    listing = listing_of(tmp_path / "a.parquet")
    items = listing.table.to_pylist()
    for order in ([99, 0, 50, 50, 17], list(range(40, 60)), [3], list(range(99, -1, -1))):
        answers: Any = listing.sources[0].fetch(
            [items[row]["id"] for row in order], [items[row]["place"] for row in order], []
        )
        assert [answer.content for answer in answers] == [contents[row] for row in order]


def test_broken_parquet_files_are_named_or_reasons(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, {"image": [A, B, C]}, row_group_size=1, compression="gzip", use_dictionary=False)
    whole = file.read_bytes()
    footer = whole[:-40] + b"\xff" * 32 + whole[-8:]
    for content in (footer, b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"nothing" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a Parquet file, got .*a\.parquet, which cannot be read"):
            listing_of(file)
    os.mkfifo(tmp_path / "fifo.parquet")
    with pytest.raises(ValueError, match=r"expected a Parquet file, got .*fifo\.parquet, which is not a regular file"):
        listing_of(tmp_path / "fifo.parquet")
    file.write_bytes(whole)
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    file.write_bytes(whole[: chunk.data_page_offset] + b"\xff" * 60 + whole[chunk.data_page_offset + 60 :])
    listing = listing_of(file)
    first, second, third = contents_of(listing)
    assert (first, third) == (A, C) and isinstance(second, str) and "\n" not in second and second != CHANGED


def test_a_parquet_file_that_changes_gives_no_other_item(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, {"image": [A, B, C], "n": [1, 2, 3]})
    listing, numbered = listing_of(file, id_column="n"), listing_of(file)
    assert contents_of(listing) == contents_of(numbered) == [A, B, C]
    write_parquet(tmp_path / "b.parquet", {"image": [B, B], "n": [9, 2]})
    os.replace(tmp_path / "b.parquet", file)
    assert contents_of(listing) == [CHANGED, B, CHANGED]
    assert contents_of(numbered) == [B, B, CHANGED]  # an id of file and row is this row of the file as it is
    assert fetch_all(numbered)["a.parquet/0"].modified == os.stat(file).st_mtime_ns
    write_parquet(file, {"other": [1]})
    assert all(isinstance(answer, str) for answer in contents_of(listing))
    file.unlink()
    assert contents_of(listing) == ["No such file or directory"] * 3


def test_large_cells_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [A, bytes(4000)]})
    monkeypatch.setattr(image_columns, "MAX_BYTES", 3999)
    assert contents_of(listing_of(tmp_path / "a.parquet")) == [A, "larger than 0 MiB"]


def fetch_contents(pickled: bytes, answers: Any) -> None:
    answers.put(contents_of(pickle.loads(pickled)))


def check_process(listing: Listing, method: str) -> None:
    """Fetch here, and in a new process or in a fork of this one, whose files are open."""
    assert contents_of(listing) == [A, B, C]
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=fetch_contents, args=(pickle.dumps(listing), answers))
    process.start()
    assert answers.get(timeout=120) == [A, B, C]
    process.join()
    assert contents_of(listing) == [A, B, C]


METHODS = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


@METHODS
def test_tables_are_fetched_in_other_processes(tmp_path: Path, method: str) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [A, B, C]}, row_group_size=2)
    check_process(listing_of(tmp_path / "a.parquet"), method)


@METHODS
def test_datasets_are_fetched_in_other_processes(tmp_path: Path, method: str) -> None:
    make_dataset().save_to_disk(tmp_path / "pets")
    check_process(listing_of(tmp_path / "pets"), method)


def make_dataset(**columns: Any) -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    cells = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate((A, B, C))]
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["p", "q", "r"]),
        caption=datasets.Value("string"),
    )
    rows = {"image": cells, "label": [0, 1, 2], "caption": ["a", "b", None]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_dataset_on_disk_is_read(tmp_path: Path) -> None:
    make_dataset().save_to_disk(tmp_path / "pets", num_shards=2)
    listing = listing_of(tmp_path / "pets", columns=["label", "caption"])
    assert ids_of(listing) == ["pets/0", "pets/1", "pets/2"] and contents_of(listing) == [A, B, C]
    assert listing.types == {"label": pa.int64(), "caption": pa.string()}
    assert fetch_all(listing, ["label", "caption"])["pets/2"].values == {"label": 2, "caption": None}
    check_stamps(listing)
    by_caption = listing_of(tmp_path / "pets", id_column="label")
    assert ids_of(by_caption) == ["0", "1", "2"] and contents_of(by_caption) == [A, B, C]
    with pytest.raises(ValueError, match=r"got null in 'caption' of .*pets, row 2"):
        listing_of(tmp_path / "pets", id_column="caption")


def test_the_splits_of_a_dataset_are_parts_of_ids(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    parts = datasets.DatasetDict(train=make_dataset(), test=make_dataset().select([2]))
    parts.save_to_disk(tmp_path / "pets")
    listing = listing_of(tmp_path / "pets")
    assert ids_of(listing) == ["train/0", "train/1", "train/2", "test/0"] and contents_of(listing) == [A, B, C, C]
    parts["train"].select([1, 1]).save_to_disk(tmp_path / "other")
    assert contents_of(listing_of(tmp_path / "other")) == [B, B]  # rows that an index selects


def test_a_dataset_that_changes_or_breaks_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    make_dataset().save_to_disk(folder)
    listing = listing_of(folder, id_column="label")
    assert contents_of(listing) == [A, B, C]
    make_dataset().select([2, 1]).save_to_disk(folder)
    assert contents_of(listing) == [CHANGED, B, CHANGED]
    (folder / "state.json").write_text("{}")
    assert all(isinstance(answer, str) for answer in contents_of(listing))
    with pytest.raises(ValueError, match=r"expected a dataset that save_to_disk wrote, got .*pets: "):
        listing_of(folder)
