"""WebDataset tars as sources: keys, columns, and members that are left out."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from clipkernels.collection.sources import tar as tar_source
from tests.collection.listings import check_stamps, contents_of, fetch_all, ids_of, image_bytes, listing_of

CHANGED = "its container changed since it was listed"


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> None:
    """Write an uncompressed tar of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


A, B, C = (image_bytes(shade) for shade in range(3))


def test_a_key_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    members = [
        ("a.b.jpg", A),
        ("a.json", b"{}"),
        ("v1.0/0002.JPG", B),
        ("v1.0/0002.txt", b"two"),
        ("./0003.png", C),
        ("nokey", b""),
        ("._a.jpg", b""),
        ("0004.txt", b"four"),
    ]
    write_tar(tmp_path / "00000.tar", members)
    listing = listing_of(tmp_path / "00000.tar", columns=["txt", "json"])
    assert ids_of(listing) == ["00000.tar/a", "00000.tar/v1.0/0002", "00000.tar/./0003"]
    assert contents_of(listing) == [A, B, C]
    assert listing.notes == [
        f"{tmp_path / '00000.tar'}: skipped members without a key and a suffix (2), samples without an image (1)"
    ]
    status = os.stat(tmp_path / "00000.tar")
    assert listing.table.column("size").to_pylist() == [len(A), len(B), len(C)]
    assert set(listing.table.column("modified").to_pylist()) == {status.st_mtime_ns}
    check_stamps(listing)
    assert [answer.values for answer in fetch_all(listing, ["txt", "json"]).values()] == [
        {"txt": None, "json": "{}"},
        {"txt": "two", "json": None},
        {"txt": None, "json": None},
    ]


def test_columns_of_tars_are_suffixes(tmp_path: Path) -> None:
    members = [("1.jpg", A), ("1.txt", b"one\n"), ("1.cls", b"7"), ("1.npy", b"\x93\xff"), ("2.jpg", B)]
    write_tar(tmp_path / "a.tar", [*members, ("2.seg.png", C)])
    listing = listing_of(tmp_path / "a.tar", columns=["txt", "cls", "npy", "seg.png"])
    assert listing.types == {"txt": pa.string(), "cls": pa.string(), "npy": pa.binary(), "seg.png": pa.binary()}
    one, two = fetch_all(listing, list(listing.types)).values()
    assert one.values == {"txt": "one", "cls": "7", "npy": b"\x93\xff", "seg.png": None}
    assert two.content == B and two.values == {"txt": None, "cls": None, "npy": None, "seg.png": C}
    with pytest.raises(ValueError, match=r"\('cls', 'jpg', 'npy', 'seg\.png', 'txt'\), got 'cap'"):
        listing_of(tmp_path / "a.tar", columns=["cap"])
    assert contents_of(listing_of(tmp_path / "a.tar", image_column="seg.png")) == [C]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_reach_members_with_long_names(tmp_path: Path, form: int) -> None:
    folder = "/".join(["f" * 60] * (2 if form == tarfile.USTAR_FORMAT else 5))
    names = [f"{folder}/{number:04d}" for number in range(5)]
    write_tar(tmp_path / "a.tar", [(f"{name}.png", image_bytes(n)) for n, name in enumerate(names)], form)
    listing = listing_of(tmp_path / "a.tar")
    assert ids_of(listing) == [f"a.tar/{name}" for name in names]
    assert contents_of(listing) == [image_bytes(number) for number in range(5)]


def test_names_in_tars_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(os.fsdecode(b"caf\xe9.png"), A), ("ü.png", B)])
    assert {key: item.content for key, item in fetch_all(listing_of(tmp_path / "a.tar")).items()} == {
        r"a.tar/caf\xe9": A,
        "a.tar/ü": B,
    }


def test_links_folders_and_sparse_members_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/f.png", tarfile.FIFOTYPE), ("d/s.png", tarfile.GNUTYPE_SPARSE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name, kind in (("d/l.png", tarfile.SYMTYPE), ("d/h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("d/a.png")
        info.size = len(A)
        tar.addfile(info, io.BytesIO(A))
    listing = listing_of(tmp_path / "a.tar")
    assert ids_of(listing) == ["a.tar/d/a"] and contents_of(listing) == [A]
    assert listing.notes[0].endswith("skipped devices and FIFOs (1), links (2), sparse members (1)")


def test_a_folder_and_a_glob_of_tars_are_one_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "t" / "00000.tar", [("1.png", A)])
    write_tar(tmp_path / "t" / "sub" / "00000.tar", [("1.png", B), ("sub/00000.tar/1.png", C)])
    for name in (tmp_path / "t", f"{tmp_path}/t/**/*.tar"):
        listing = listing_of(name)
        assert len(listing.sources) == 1
        assert ids_of(listing) == ["00000.tar/1", "sub/00000.tar/1", "sub/00000.tar/sub/00000.tar/1"]
        assert contents_of(listing) == [A, B, C]
    with pytest.raises(ValueError, match=r"got '00000\.tar/1' in '.*/t/00000\.tar' and '.*/sub/00000\.tar'"):
        listing_of(tmp_path / "t" / "00000.tar", tmp_path / "t" / "sub" / "00000.tar")


def test_a_folder_with_compressed_tars_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.png", A)])
    (tmp_path / "1.TAR.gz").touch()
    with pytest.raises(ValueError, match=r"expected an uncompressed tar, got 1\.TAR\.gz: decompress it"):
        listing_of(tmp_path)


def test_a_sample_with_two_images_asks_for_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", A), ("1.png", B)])
    with pytest.raises(ValueError, match=r"a\.tar: '1' has several images: name one of 'jpg', 'png' by image_column"):
        listing_of(tmp_path / "a.tar")
    assert contents_of(listing_of(tmp_path / "a.tar", image_column="png")) == [B]
    write_tar(tmp_path / "a.tar", [("1.jpg", A), ("1.jpg", B)])
    with pytest.raises(ValueError, match=r"a\.tar: '1\.jpg' is there twice"):
        listing_of(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", [("1.jpg", A), ("2.jpg", B), ("1.jpg", C)])
    with pytest.raises(ValueError, match=r"expected ids that differ, got 'a\.tar/1' twice in"):
        listing_of(tmp_path / "a.tar")


def test_broken_tars_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number}.png", image_bytes(number)) for number in range(3)])
    whole = (tmp_path / "a.tar").read_bytes()
    broken = {
        "empty": b"",
        "no tar": b"nothing " * 200,
        "truncated content": whole[: 1024 + 512 + 20],
        "truncated header": whole[: 1024 + 200],
        "corrupt header": whole[:1024] + b"\1" * 512 + whole[1536:],
        "gzip": b"\x1f\x8b" + bytes(2000),
    }
    for kind, content in broken.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected an uncompressed tar, got .*a\.tar"):
            print(kind, ids_of(listing_of(tmp_path / "a.tar")))
    write_tar(tmp_path / "a.tar", [("1.txt", b"")])
    with pytest.raises(ValueError, match=r"expected images, got none in .*: skipped samples without an image"):
        listing_of(tmp_path / "a.tar")


def test_a_tar_that_changes_gives_no_other_item(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    write_tar(tar, [("1.png", A), ("2.png", B), ("3.png", C)])
    listing = listing_of(tar)
    assert contents_of(listing) == [A, B, C]  # the tar is open now
    write_tar(tmp_path / "b.tar", [("0.png", A), ("2.png", C)])
    os.replace(tmp_path / "b.tar", tar)
    assert contents_of(listing)[:2] == [CHANGED, C]  # the key is the same, and so is the offset
    assert isinstance(contents_of(listing)[2], str)
    with tar.open("r+b") as file:
        file.truncate(1024 + 512 + 10)
    assert all(isinstance(answer, str) for answer in contents_of(listing))
    tar.write_bytes(b"")
    assert contents_of(listing) == [CHANGED] * 3
    tar.unlink()
    assert contents_of(listing) == ["No such file or directory"] * 3
    os.mkfifo(tar)
    assert all("not a regular file" in reason for reason in contents_of(listing))


def test_large_members_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", A), ("1.txt", b"x" * 40), ("2.png", bytes(4000))])
    listing = listing_of(tmp_path / "a.tar")
    monkeypatch.setattr(tar_source, "MAX_BYTES", 3999)
    assert contents_of(listing) == [A, "larger than 0 MiB"]
    monkeypatch.setattr(tar_source, "MAX_SIDECAR", 39)
    assert fetch_all(listing, ["txt"])["a.tar/1"] == "larger than 0 MiB"


def test_a_pickled_tar_is_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", A), ("2.png", B)])
    listing = listing_of(tmp_path / "a.tar")
    assert contents_of(listing) == [A, B]
    assert contents_of(pickle.loads(pickle.dumps(listing))) == [A, B]
