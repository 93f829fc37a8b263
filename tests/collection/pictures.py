"""Folders of pictures, of broken files, and the rows and bytes of collections."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from clipkernels.images.reader import MAX_BYTES


def draw_pictures(folder: Path, count: int, seed: int = 0, side: int = 24) -> Path:
    """A folder of random pictures 00.png, 01.png, …; captions are beside the first six, that of 05.png is empty."""
    folder.mkdir()
    values = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        if number < 6:
            (folder / f"{number:02}.txt").write_text("" if number == 5 else f"picture {number}")
    return folder


def broken_files(folder: Path) -> dict[str, str]:
    """Write files that are odd and files that cannot be embedded; return the latter with a part of their reason."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    content = io.BytesIO()
    picture.save(content, "JPEG")
    (folder / "truncated.jpg").write_bytes(content.getvalue()[:-200])
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    reasons = {"truncated.jpg": "truncated", "corrupt.png": "", "empty.png": "not an image", "text.png": "not an image"}
    os.mkfifo(folder / "fifo.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return reasons | {"fifo.png": "not a regular file", "huge.png": "512 MiB", "link.png": "No such file"}


def read_rows(folder: Path, kind: str = "embeddings") -> list[dict[str, Any]]:
    """The rows of a collection's embeddings or errors, in the order of their files."""
    rows: list[dict[str, Any]] = []
    for file in sorted((folder / kind).glob("*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return rows


def folder_bytes(folder: Path, *, times: bool = False) -> dict[str, Any]:
    """The content of each regular file below a folder, with its time of change if asked for."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size < 2**24)
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns if times else None) for file in files
    }
