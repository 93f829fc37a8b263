"""Sources of image files: folders, globs, files and lists of paths; ids, columns, and a listing of all sources."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clipkernels.collection.layout import listing_schema
from clipkernels.collection.sources import find_sources, list_items
from clipkernels.collection.sources import listing as listing_module
from clipkernels.collection.sources.items import make_batch
from clipkernels.images.reader import MAX_BYTES
from tests.collection.listings import check_stamps, contents_of, fetch_all, ids_of, listing_of, write_images

NAMES = ["a.png", "b.png", "x/c.png", "x/y/d.png", "z/e.png"]


def test_a_folder_has_ids_relative_to_it_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_images(tmp_path / "photos", NAMES)
    (tmp_path / "photos" / "notes.md").touch()
    (tmp_path / "photos" / ".hidden.png").touch()
    listing = listing_of(tmp_path / "photos")
    assert listing.table.schema == listing_schema()
    assert ids_of(listing) == NAMES and contents_of(listing) == contents
    assert listing.notes == [f"{tmp_path / 'photos'}: skipped 1 .md: not images"] and listing.types == {}
    status = os.stat(tmp_path / "photos" / "x" / "c.png")
    row = listing.table.slice(2, 1).to_pylist()[0]
    assert (row["size"], row["modified"], row["source"]) == (status.st_size, status.st_mtime_ns, 0)
    check_stamps(listing)
    # A relative source stays the same folder after the process changes its own.
    monkeypatch.chdir(tmp_path)
    relative = listing_of("photos/")
    monkeypatch.chdir("/")
    assert ids_of(relative) == NAMES and contents_of(relative) == contents and relative.sources[0].name == "photos/"


def test_a_glob_has_ids_relative_to_its_fixed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_images(tmp_path / "[odd]" / "photos", NAMES)
    monkeypatch.chdir(tmp_path / "[odd]")
    for pattern, ids in (
        ("photos/**/*.png", NAMES),
        ("./photos/x/*.png", ["c.png"]),
        ("photos/[xz]", ["x/c.png", "x/y/d.png", "z/e.png"]),
        ("*/a.png", ["photos/a.png"]),
        ("**/e.png", ["photos/z/e.png"]),
    ):
        listing = listing_of(pattern)
        assert ids_of(listing) == ids
        numbers = [NAMES.index(next(name for name in NAMES if name.endswith(key.split("/")[-1]))) for key in ids]
        assert contents_of(listing) == [contents[number] for number in numbers]
    absolute = listing_of(str(tmp_path) + "/?odd?/photos/*.png")
    assert ids_of(absolute) == ["[odd]/photos/a.png", "[odd]/photos/b.png"]
    assert contents_of(absolute) == contents[:2]
    with pytest.raises(ValueError, match="which matches nothing"):
        listing_of("gone/*.png")


def test_a_file_has_its_name_as_id(tmp_path: Path) -> None:
    (content,) = write_images(tmp_path, ["x/a.photo"])
    listing = listing_of(tmp_path / "x" / "a.photo")
    assert ids_of(listing) == ["a.photo"] and contents_of(listing) == [content]


def test_a_list_has_its_lines_as_ids(tmp_path: Path) -> None:
    contents = write_images(tmp_path, ["x/a.png", "x/b c.png", "far/d.png"])
    lines = [b"a.png", b"", b"  ", b"b c.png\r", str(tmp_path / "far" / "d.png").encode(), b"gone.png", b"nul\0.png"]
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "x" / "list.txt").write_bytes(start + b"\n".join(lines))
        listing = listing_of(tmp_path / "x" / "list.txt")
        assert ids_of(listing) == ["a.png", "b c.png", str(tmp_path / "far" / "d.png"), "gone.png", "nul\0.png"]
        assert contents_of(listing) == [*contents, "No such file or directory", "embedded null byte"]
        assert listing.table.column("size").to_pylist()[3:] == [-1, -1]
    (tmp_path / "twice.lst").write_text("x/a.png\nx/a.png\n")
    with pytest.raises(ValueError, match=r"expected ids that differ, got 'x/a\.png' in twice in"):
        listing_of(tmp_path / "twice.lst")


def test_equal_ids_of_two_sources_name_both(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_images(tmp_path / folder, ["a.png", f"{folder}.png"])
    names = str(tmp_path / "one"), str(tmp_path / "two")
    with pytest.raises(ValueError) as caught:
        listing_of(*names)
    expected = f"expected ids that differ, got 'a.png' in {names[0]!r} and {names[1]!r}: name a folder above both"
    assert str(caught.value).startswith(expected)
    (tmp_path / "two" / "a.png").unlink()
    listing = listing_of(*names)
    assert ids_of(listing) == ["a.png", "one.png", "two.png"]
    assert listing.table.column("source").to_pylist() == [0, 0, 1]


def test_ids_of_one_hash_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    monkeypatch.setattr(listing_module, "hash", lambda text: 7, raising=False)
    assert ids_of(listing_of(tmp_path)) == NAMES
    with pytest.raises(ValueError, match=r"got 'a\.png' in twice in"):
        listing_of(tmp_path, tmp_path)


def test_columns_come_from_sidecars(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.v2.png", "x/c.png", "d.png", "e.png"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red car\r\n")
    (tmp_path / "b.v2.txt").write_text("two\nlines\n")
    (tmp_path / "x" / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "a.json").write_text('{"n": 1}')
    (tmp_path / "a.npy").write_bytes(b"\x93\n")
    listing = listing_of(tmp_path, columns=["txt", "npy"])
    assert listing.types == {"txt": pa.string(), "npy": pa.binary()}
    assert listing.notes == [f"{tmp_path}: skipped 1 .json: not images"]
    answers = fetch_all(listing, ["txt", "npy"])
    assert answers["a.png"].values == {"txt": "a red car", "npy": b"\x93\n"}
    assert answers["b.v2.png"].values == {"txt": "two\nlines", "npy": None}
    assert answers["x/c.png"].values == {"txt": "caf\ufffd", "npy": None}
    assert answers["d.png"] == "the file of a column: not a regular file"
    assert answers["e.png"].values == {"txt": None, "npy": None}
    for name in (tmp_path / "a.png", f"{tmp_path}/*.png"):
        assert fetch_all(listing_of(name, columns=["json"]), ["json"])["a.png"].values == {"json": '{"n": 1}'}
    assert "a.txt" not in ids_of(listing_of(f"{tmp_path}/a*", columns=["txt"]))
    (tmp_path / "list.txt").write_text("a.png\ngone/f.png\n")
    answers = fetch_all(listing_of(tmp_path / "list.txt", columns=["txt"]), ["txt"])
    assert answers["a.png"].values == {"txt": "a red car"}


def test_a_column_that_no_source_has_names_the_others(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match=r"columns of the sources \(which have none\), got 'caption'"):
        listing_of(tmp_path, columns=["caption"])
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match=r"expected columns of the sources \('json', 'txt'\), got 'caption'"):
        listing_of(tmp_path, columns=["txt", "caption"])


def test_a_column_has_one_type_in_all_sources() -> None:
    class Typed:
        name, note = "typed", None

        def __init__(self, key: str, kind: pa.DataType) -> None:
            self.key, self.kind = key, kind

        def list(self, columns: Any) -> Any:
            yield make_batch([self.key], [0], [0], [0])

        def columns(self) -> Any:
            return {"n": self.kind}

    pair: Any = [Typed("a", pa.int64()), Typed("b", pa.string())]
    with pytest.raises(ValueError, match=r"one type of the column 'n' in all sources, got int64, and string in typed"):
        list_items(pair, ["n"])
    assert list_items(pair[:1], ["n"]).types == {"n": pa.int64()}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names of any bytes")
def test_names_that_are_not_utf8_are_escaped_and_read(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    names = [b"caf\xe9.png", b"back\\slash\xff.png", b"plain\\xe9.png", "ü.png".encode(), b"new\nline.png"]
    (tmp_path / "d").mkdir()
    for number, name in enumerate(names):
        with open(os.path.join(root, b"d", name), "wb") as file:
            file.write(b"%d" % number)
    for listing in (listing_of(tmp_path / "d"), listing_of(f"{tmp_path}/d/*.png")):
        expected = {r"caf\xe9.png": b"0", r"back\\slash\xff.png": b"1", r"plain\xe9.png": b"2", "ü.png": b"3"}
        expected["new\nline.png"] = b"4"
        assert {key: item.content for key, item in fetch_all(listing).items()} == expected
    with open(root + b"/list.txt", "wb") as file:
        file.write(b"d/" + b"\nd/".join(names[:4]))
    assert contents_of(listing_of(tmp_path / "list.txt")) == [b"0", b"1", b"2", b"3"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_files_that_are_not_read_are_reasons_at_once(tmp_path: Path) -> None:
    write_images(tmp_path, ["photos/good.png", "far/linked.png"])
    folder = tmp_path / "photos"
    os.mkfifo(folder / "fifo.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "round.png").symlink_to("round.png")
    (folder / "far").symlink_to(tmp_path / "far")
    (folder / "up").symlink_to("..")
    (folder / "empty.png").touch()
    with (folder / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    start = time.monotonic()
    listing = listing_of(folder)
    answers = fetch_all(listing)
    assert answers["fifo.png"] == answers["device.png"] == "not a regular file"
    assert answers["broken.png"] == "No such file or directory"
    assert answers["round.png"] == "Too many levels of symbolic links"
    assert answers["huge.png"] == f"larger than {MAX_BYTES // 2**20} MiB"
    assert answers["empty.png"].content == b"" and answers["far/linked.png"].content
    assert len(answers) == 8  # the link to the folder above is not followed
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="which is not a regular file"):
        listing_of(tmp_path / "list.txt")
    assert contents_of(listing_of(folder / "fifo.png")) == ["not a regular file"]
    assert time.monotonic() - start < 20


def test_a_file_that_changes_or_vanishes_is_right_or_a_reason(tmp_path: Path) -> None:
    first, _ = write_images(tmp_path, ["a.png", "b.png"])
    listing = listing_of(tmp_path)
    (tmp_path / "a.png").write_bytes(first + b"more")
    (tmp_path / "b.png").unlink()
    answers = fetch_all(listing)
    assert answers["a.png"].content == first + b"more" and answers["a.png"].size == len(first) + 4
    assert answers["b.png"] == "No such file or directory"


def test_sources_without_items_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").touch()
    (tmp_path / "blank.txt").write_text("\n\n")
    for name, message in (
        ("empty", r"expected images \(.*\), got none under '.*empty'"),
        ("notes", r"got none under '.*notes': skipped 1 \.md: not images"),
        ("blank.txt", "expected a file of paths, one a line, got .* without any"),
        ("gone.png", "expected a file, a folder or a glob, got .*, which matches nothing"),
        ("a.tar.gz", "expected an uncompressed tar, got .*: decompress it"),
        ("notes/*.md", "expected images, got none that match"),
        ("a.tgz", "expected an uncompressed tar, got .*: decompress it"),
    ):
        with pytest.raises(ValueError, match=message):
            listing_of(tmp_path / name, columns=["md"] if "*" in name else [])
    with pytest.raises(ValueError, match="expected 1 to 32767 sources, got 0"):
        find_sources([])
    for option in ("image_column", "id_column"):
        write_images(tmp_path, ["a.png"])
        with pytest.raises(ValueError, match=f"for {option}='x', got '.*a.png'"):
            find_sources([str(tmp_path / "a.png")], **{option: "x"})  # type: ignore[arg-type]


def fetch_contents(pickled: bytes, answers: Any) -> None:
    answers.put(contents_of(pickle.loads(pickled)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_sources_fetch_in_other_processes(tmp_path: Path, method: str) -> None:
    contents = write_images(tmp_path, NAMES)
    pickled = pickle.dumps(listing_of(tmp_path))
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=fetch_contents, args=(pickled, answers))
    process.start()
    assert answers.get(timeout=120) == contents
    process.join()


def test_threads_fetch_from_one_source(tmp_path: Path) -> None:
    contents = write_images(tmp_path, NAMES)
    listing, answers = listing_of(tmp_path), list[Any]()
    threads = [threading.Thread(target=lambda: answers.append(contents_of(listing))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [contents] * 4


SCALE = """
import resource, sys, time
import numpy as np
from clipkernels.collection.sources.items import make_batch
from clipkernels.collection.sources import find_sources, list_items

class Numbers:
    name, note = "numbers", None
    def __init__(self, count):
        self.count = count
    def list(self, columns=()):
        for start in range(0, self.count, 10_000):
            rows = range(start, min(self.count, start + 10_000))
            yield make_batch([f"folder/sub/{row:09d}.jpg" for row in rows], rows, rows, rows)
    def columns(self):
        return {}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

sources = lambda count: find_sources([sys.argv[1]]) if len(sys.argv) > 1 else [Numbers(count)]
list_items([Numbers(10_000)])
before, start = peak(), time.process_time()
listing = list_items(sources(1_000_000))
print(len(listing.table), peak() - before, time.process_time() - start)
"""


def test_a_million_ids_grow_the_memory_by_less_than_120_mb() -> None:
    result = subprocess.run([sys.executable, "-c", SCALE], capture_output=True, text=True, check=True)
    rows, growth, seconds = map(float, result.stdout.split())
    assert rows == 1_000_000 and growth < 120 and seconds < 5, result.stdout


@pytest.mark.slow
def test_a_folder_of_200_000_files_is_listed_in_batches(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(10_000):
            os.mknod(tmp_path / f"{folder:03d}" / f"photo-{number:09d}.jpg")
    result = subprocess.run([sys.executable, "-c", SCALE, str(tmp_path)], capture_output=True, text=True, check=True)
    rows, growth, seconds = map(float, result.stdout.split())
    assert rows == 200_000 and growth < 60 and seconds < 15, result.stdout
