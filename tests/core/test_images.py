"""The walker and the reader of image files, on drawn files that other readers get wrong."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader

from clipkernels import files, messages
from clipkernels.files import open_regular
from clipkernels.images import (
    Found,
    Reader,
    find_images,
    formats,
    images_below,
    read_bytes,
    readable_formats,
    reader,
    walker,
)
from clipkernels.images.batches import Pictures, collate

T = Image.Transpose
# The transposition that stores an upright image so that the tag turns it upright again.
STORED = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
STORED |= {6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
CARRIERS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("MPO", {"quality": 95, "subsampling": 0}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "packbits"}),
    ("AVIF", {"quality": 95}),
]
FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")


def drawing() -> Image.Image:
    """An image without symmetries: 24×40 pixels, smooth, so that JPEG keeps it nearly as it is."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([6 * x, 10 * y, 2 * x + 4 * y], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def saved(image: Image.Image, form: str, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream


def decoded(content: bytes | io.BytesIO, **options: Any) -> np.ndarray:
    return pixels(Reader(**options).decode(io.BytesIO(content) if isinstance(content, bytes) else content))


def exif_of(entries: list[tuple[int, int, int, int]]) -> bytes:
    """An EXIF block of entries (tag, type, count, value or offset), little-endian."""
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize(("form", "options"), CARRIERS)
def test_exif_orientation_is_applied_once(form: str, options: dict[str, Any], tag: int) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    upright, exif = drawing(), Image.Exif()
    stored = upright.transpose(STORED[tag]) if tag > 1 else upright
    exif[274] = tag
    header = {"tiffinfo": {274: tag}} if form == "TIFF" else {"exif": exif}
    result = decoded(saved(stored, form, **header, **options))
    assert result.shape == (24, 40, 3)
    lossy = 10 if form in ("JPEG", "MPO", "AVIF") else 0
    assert np.abs(result.astype(int) - pixels(upright)).max() <= lossy


def test_without_exif_the_stored_pixels_are_returned() -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = drawing().transpose(STORED[6])
    assert np.array_equal(decoded(saved(stored, "PNG", exif=exif), exif=False), pixels(stored))
    assert (Reader().rules, Reader(exif=False).rules) == ("1", "1, no EXIF")
    assert Reader.of("1, no EXIF") == Reader(exif=False) and Reader.of("1") == Reader()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"garbage", False),
        (b"II*\0\x08", False),
        (exif_of([(274, 3, 1, 9)]), False),
        (exif_of([(274, 2, 1, 0x36)]), False),
        (exif_of([(274, 3, 0, 6)]), False),
        (exif_of([(274, 5, 9, 0x7FFFFFFF)]), False),
        # Other tags are broken; Pillow's exif_transpose raises TypeError and struct.error for these two.
        (exif_of([(274, 3, 1, 6), (700, 12, 1, 8)]), True),
        (exif_of([(274, 3, 1, 6), (0xA005, 2, 2, 0x4141)]), True),
        # Before version 13 Pillow reads no tag that follows one outside of the block.
        (exif_of([(270, 2, 100, 0x7FFFFFFF), (274, 3, 1, 6)]), int(PIL.__version__.split(".")[0]) >= 13),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of a corrupt EXIF block
def test_a_broken_exif_tag_costs_no_image(form: str, exif: bytes, turned: bool) -> None:
    upright = drawing()
    block = b"Exif\0\0" + exif if form == "JPEG" else exif
    options = {"lossless": True} if form == "WEBP" else {}
    result = decoded(saved(upright.transpose(STORED[6]), form, exif=block, **options))
    assert result.shape == ((24, 40, 3) if turned else (40, 24, 3))


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "I;16"), ("JPEG2000", "I;16"), ("PPM", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")],
)
def test_grey_of_16_bits_is_shifted(form: str, mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (16, 16), DEEP.astype(order).tobytes())
    result = decoded(saved(image, form))
    assert np.array_equal(result, np.stack([GREY] * 3, -1))


def test_a_dark_pgm_of_16_bits_stays_dark() -> None:
    content = b"P5 16 16 65535\n" + GREY.astype(">u2").tobytes()
    assert decoded(content).max() == 0
    assert np.array_equal(decoded(b"P5 16 16 1023\n" + (GREY * 4.0 + 3).astype(">u2").tobytes())[..., 0], GREY)


def test_a_tiff_of_12_bits_or_of_inverted_grey_is_read() -> None:
    twelve = b"".join(
        ((first << 12) | second).to_bytes(3, "big") for first, second in (GREY.reshape(-1, 2).astype(int) * 16).tolist()
    )
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8 + 2 + 12 * 8 + 4), (278, 3, 1, 16), (279, 4, 1, len(twelve))]
    assert np.array_equal(decoded(exif_of(tags) + twelve)[..., 0], GREY)
    white_is_zero = saved(Image.fromarray(65535 - DEEP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decoded(white_is_zero)[..., 0], GREY)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.int32), GREY),
        (DEEP.astype(np.int32), GREY),
        (GREY.astype(np.float32) / 255, GREY),
        (np.full((16, 16), 0.5, np.float32), np.full((16, 16), 128, np.uint8)),
        (GREY.astype(np.int32) - 1, "grey integers from -1 to 254, expected 0 to 65535"),
        (GREY.astype(np.int32) * 258, "grey integers from 0 to 65790, expected 0 to 65535"),
        (GREY.astype(np.float32) * 1e9, "expected 0 to 1"),
        (np.where(GREY == 7, np.nan, 0.5).astype(np.float32), "grey floats from nan to nan, expected 0 to 1"),
        (np.where(GREY == 7, np.inf, 0.5).astype(np.float32), "grey floats from 0.5 to inf, expected 0 to 1"),
        (np.where(GREY == 7, -0.1, 0.5).astype(np.float32), "expected 0 to 1"),
    ],
)
def test_wide_grey_is_scaled_or_refused(values: np.ndarray, expected: np.ndarray | str) -> None:
    content = saved(Image.fromarray(values), "TIFF")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            decoded(content)
    else:
        assert np.array_equal(decoded(content), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bits_are_as_pillow_converts_them(mode: str) -> None:
    image = drawing().convert(mode)
    assert np.array_equal(decoded(saved(image, "PNG")), pixels(image.convert("RGB")))


def test_alpha_is_dropped_with_its_colours_kept() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 30, 40, 0))
    assert (decoded(saved(clear, "PNG")) == (200, 30, 40)).all()


@pytest.mark.parametrize("form", ["ICO", "TGA", "PCX", "SGI", "EPS"])
def test_no_other_decoder_runs(form: str, tmp_path: Path) -> None:
    drawing().save(tmp_path / "picture.png", form)
    assert Reader().prepare(tmp_path / "picture.png", lambda image: torch.zeros(1), (1,)) == (
        "not an image (no format that is read)"
    )


@FIFO
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    start = time.monotonic()
    for name in ("pipe.png", "link.png", "endless.png", "."):
        with pytest.raises(ValueError, match="not a regular file"):
            open_regular(tmp_path / name)
    # A FIFO that takes a file's place between the check and the opening does not block either.
    check, calls = files._check_regular, list[os.stat_result]()

    def skip_first(status: os.stat_result, limit: int | None) -> None:
        return check(status, limit) if calls else calls.append(status)

    monkeypatch.setattr(files, "_check_regular", skip_first)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "pipe.png")
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    assert time.monotonic() - start < 5


def test_large_files_and_images_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large.bmp").open("wb") as file:
        file.truncate(512 * 2**20 + 1)
    with pytest.raises(ValueError, match="larger than 512 MiB"):
        read_bytes(tmp_path / "large.bmp")
    for size, refused in (((1, 200), False), ((1, 201), True), ((201, 1), True), ((60000, 1), True)):
        content = saved(Image.new("L", size), "PNG")
        if refused:
            with pytest.raises(ValueError, match="sides beyond 200:1"):
                decoded(content)
        else:
            assert decoded(content).shape == (*size[::-1], 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40)
    assert decoded(saved(drawing(), "PNG")).shape == (24, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="40×24 pixels, more than Pillow's"),
    ):
        decoded(saved(drawing(), "PNG"))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("x"), OSError(5, "I/O error")])
def test_whatever_a_file_raises_costs_that_file_alone(error: Exception, tmp_path: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        if image.size == (9, 9):
            raise error
        return torch.tensor(pixels(image).copy()).permute(2, 0, 1)

    drawing().save(tmp_path / "0.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    batch = collate([Pictures(paths, preprocess, (3, 24, 40))[index] for index in range(4)])
    assert batch.indices == [0] and batch.images is not None
    assert np.array_equal(batch.images[0].permute(1, 2, 0), pixels(drawing()))
    (_, preprocessing), (_, broken), (_, missing) = batch.failed
    assert preprocessing.startswith("preprocessing failed (") and broken and missing == "No such file or directory"


def test_a_preprocessing_without_a_tensor_is_named(tmp_path: Path) -> None:
    drawing().save(tmp_path / "0.png")
    answer: Any = Reader().prepare(tmp_path / "0.png", lambda image: {"pixel_values": 1}, (3, 24, 40))  # type: ignore[arg-type]
    assert answer == "preprocessing gave no tensor but a dict"


def first_row(image: Image.Image) -> Tensor:
    return torch.tensor(pixels(image)[0].copy())


def test_workers_carry_the_reader(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    drawing().transpose(STORED[3]).save(tmp_path / "0.png", exif=exif)
    for turn in (True, False):
        dataset = pickle.loads(pickle.dumps(Pictures([str(tmp_path / "0.png")], first_row, (40, 3), exif=turn)))
        (batch,) = DataLoader(dataset, 1, num_workers=1, collate_fn=collate)
        expected = pixels(drawing() if turn else drawing().transpose(STORED[3]))[0]
        assert np.array_equal(batch.images[0], expected)


def make_tree(root: Path) -> None:
    """Folders with links round: photos/{a/inside.png, by_link -> a, a/loop -> .., note.txt, …}."""
    (root / "photos" / "a").mkdir(parents=True)
    drawing().save(root / "photos" / "a" / "inside.png")
    for name in ("._top.png", ".hidden.png", "top.PNG", "photo.heic"):
        (root / "photos" / name).write_bytes((root / "photos" / "a" / "inside.png").read_bytes())
    (root / "photos" / ".cache").mkdir()
    (root / "photos" / ".cache" / "thumb.png").touch()
    (root / "photos" / "notes.txt").touch()
    (root / "photos" / "README").touch()
    (root / "photos" / "by_link").symlink_to("a")
    (root / "photos" / "a" / "loop").symlink_to("..")
    (root / "photos" / "a" / "self").symlink_to(".")
    (root / "photos" / "a" / "round.png").symlink_to("round.png")
    (root / "elsewhere").mkdir()
    drawing().save(root / "elsewhere" / "far.jpg")
    (root / "photos" / "far").symlink_to(root / "elsewhere")


PHOTOS = ["a/inside.png", "a/round.png", "by_link/inside.png", "by_link/round.png", "far/far.jpg", "top.PNG"]


@pytest.fixture
def no_heif(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pillow-heif as if it were not installed."""
    for module in (formats, reader, walker):
        monkeypatch.setattr(
            module, "readable_formats", lambda: tuple(name for name in formats.FORMATS if name != "HEIF")
        )


def test_linked_folders_are_followed_and_no_link_goes_round(tmp_path: Path, no_heif: None) -> None:
    make_tree(tmp_path)
    found = images_below(str(tmp_path / "photos"))
    assert found.paths == [str(tmp_path / "photos" / name) for name in PHOTOS]
    assert found.others == Counter({".txt": 1, "without a suffix": 1, ".heic": 1})
    # The folder above is an ancestor too, although the walk does not begin there.
    assert images_below(str(tmp_path / "photos" / "a")).paths == [
        str(tmp_path / "photos" / "a" / name) for name in ("inside.png", "round.png")
    ]


def test_globs_end_where_links_go_round(tmp_path: Path, no_heif: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    named = [name for name in PHOTOS if name.endswith(".png")]
    assert find_images(["photos/**/*.png"]).paths == [f"photos/{name}" for name in named]
    assert find_images(["**/inside.png"]).paths == ["photos/a/inside.png", "photos/by_link/inside.png"]
    assert find_images(["photos/**"]).paths == [f"photos/{name}" for name in PHOTOS]
    assert find_images(["photos/**/*"]).paths.count("photos/a/inside.png") == 1
    assert find_images(["ph*/**/l*/**/*.png", "photos/top.PNG"]).paths[-1] == "photos/top.PNG"


def test_hidden_files_are_taken_when_named(tmp_path: Path) -> None:
    make_tree(tmp_path)
    names = [str(tmp_path / "photos" / name) for name in (".hidden.png", "._top.png", "notes.txt")]
    assert find_images(names) == Found(names, Counter())
    assert find_images([str(tmp_path / "photos" / ".h*")]).paths == names[:1]


def test_other_files_are_counted_in_one_line(no_heif: None) -> None:
    assert Found([], Counter()).note is None
    assert Found([], Counter({".heic": 3})).note == "skipped 3 .heic: install pillow-heif"
    counts = Counter({".heic": 3, ".avif": 2, ".txt": 2, "without a suffix": 1})
    assert Found([], counts).note == (
        "skipped 3 .heic: install pillow-heif; 2 .avif: install a Pillow that reads it; 2 .txt, 1 without a suffix: "
        "not images"
    )
    many = Found([], Counter({f".x{index}": 1 for index in range(20)})).note
    assert many is not None and many.endswith("1 .x15, 12 of other kinds: not images")


def test_errors_of_the_walker_are_its_own(tmp_path: Path, no_heif: None) -> None:
    with pytest.raises(ValueError, match=r"expected a file, a folder or a glob, got .*, which matches nothing"):
        find_images([str(tmp_path / "gone*")])
    (tmp_path / "phone.heic").touch()
    with pytest.raises(ValueError, match=r"expected images \(\.jpg, .*got none under .*: skipped 1 \.heic: install"):
        find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        images_below(str(tmp_path / "gone"))


def test_heif_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif: Any = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.from_pillow(drawing()).save(tmp_path / "phone.heic", quality=-1, chroma=444)
    assert images_below(str(tmp_path)).paths == [str(tmp_path / "phone.heic")]
    assert np.abs(pixels(Reader().read(tmp_path / "phone.heic")).astype(int) - pixels(drawing())).max() <= 3


def test_a_format_that_pillow_lacks_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append("HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(formats.features, "check", lambda name: name != "avif")
    monkeypatch.setitem(Image.OPEN, "HEIF", None)
    names = formats.readable_formats.__wrapped__()
    assert registered == ["HEIF"] and "HEIF" in names and "AVIF" not in names and "WEBP" in names
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    assert "HEIF" not in formats.readable_formats.__wrapped__()


def test_an_image_of_another_shape_costs_that_image_alone(tmp_path: Path) -> None:
    for index, size in enumerate(((40, 24), (40, 32), (40, 24))):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    unsized = Pictures(paths, lambda image: torch.tensor(pixels(image).copy()).permute(2, 0, 1), (3, 24, 40))
    batch = collate([unsized[index] for index in range(3)])
    assert batch.indices == [0, 2] and batch.images is not None and batch.images.shape == (2, 3, 24, 40)
    assert batch.failed == [(1, "preprocessing gave (3,32,40) instead of (3,24,40)")]


@pytest.mark.parametrize(
    ("start", "lacking", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIF", "HEIF: install pillow-heif"),
        (b"\0\0\n\x18ftypmif1\0\0\0\0heic", "HEIF", "HEIF: install pillow-heif"),
        (b"\0\0\0\x1cftypavif\0\0\0\0mif1", "AVIF", "AVIF: install a Pillow that reads it"),
        (b"RIFF\n\0\0\0WEBPVP8 ", "WEBP", "WEBP: install a Pillow that reads it"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000", "JPEG2000: install a Pillow that reads it"),
        (b"RIFF\n\0\0\0WAVEfmt ", "WEBP", "not an image (no format that is read)"),
    ],
)
def test_a_named_file_of_a_format_that_is_not_read_has_a_remedy(
    start: bytes, lacking: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = tuple(name for name in formats.FORMATS if name != lacking and name in readable_formats())
    monkeypatch.setattr(reader, "readable_formats", lambda: rest)
    assert Reader().prepare(start, first_row, (40, 3)) == reason


def test_names_of_files_keep_a_message_in_one_line() -> None:
    assert messages.skip_message("a\nb\x1b[2J.png", "Is a directory") == r"skipped a\nb\x1b[2J.png: Is a directory"
    assert messages.reason_of(OSError("broken\nfile")) == "broken file"
    named = OSError("unreadable")
    named.filename = "a.png"
    assert messages.reason_of(named) == "unreadable" and messages.reason_of(OSError(5, "I/O error")) == "I/O error"
    assert messages.quantity(1, "class") == "1 class" and messages.quantity(2, "patch") == "2 patches"
    assert messages.list_names([str(index) for index in range(12)]).endswith(", '9' and 2 more")
