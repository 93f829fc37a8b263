"""Parquet files of a known format, written atomically with a signed header and checksums of their pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clipkernels.collection.packages import pyarrow
from clipkernels.files import atomic_write, naming, open_named
from clipkernels.formats import REMEDY, Format, decode_header, encode_header
from clipkernels.messages import first_line

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = "clipkernels"
"""The key of a file's Parquet metadata; its value is the header as JSON."""
MAX_HEADER_BYTES = 1 << 22


@contextmanager
def parquet_writer(
    path: Path, schema: pa.Schema, form: Format, header: msgspec.Struct, *, sync: bool = True
) -> Iterator[Any]:
    """Yield a writer of row groups; the file replaces `path` on success. Equal tables give equal files.

    Args:
        path: the file.
        schema: the columns.
        form, header: the format, and the header in it.
        sync: wait until the disk has the content, because other files are deleted for it. Without, a crash of the
            system may damage the file, which is then refused when it is read.
    Raises:
        OSError: the file cannot be written. It names `path`, and leaves no temporary file.
    """
    pq = pyarrow().parquet
    text = encode_header(form, header, {}, limit=MAX_HEADER_BYTES)
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["id"], "write_page_checksum": True}
    with naming(path), atomic_write(path) as temporary, open(temporary, "wb") as file:
        writer = pq.ParquetWriter(file, schema.with_metadata({METADATA_KEY: text}), **options)
        try:
            yield writer
        finally:
            writer.close()
        file.flush()
        if sync:
            os.fsync(file.fileno())


@contextmanager
def open_parquet(path: Path, form: Format) -> Iterator[tuple[Any, Any]]:
    """Yield the header of a file that `parquet_writer` wrote, and the file as a pyarrow.parquet.ParquetFile.

    Raises:
        ValueError: another kind of file, or not as it was written; also for what is read within the context.
        OSError: the file cannot be read.
    """
    arrow = pyarrow()
    try:
        with open_named(path, form.title) as stream:
            file = arrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            text = (file.metadata.metadata or {}).get(METADATA_KEY.encode())
            if text is None:
                raise ValueError("no header of clipkernels")
            header, _ = decode_header(form, text.decode())
            yield header, file
    except (ValueError, OSError, arrow.ArrowException, MemoryError) as error:
        # Arrow reports a page with another checksum as an OSError without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _refusal(path, form, error) from error


def _refusal(path: Path, form: Format, error: BaseException) -> ValueError:
    reason = first_line(error)
    advice = "" if REMEDY in reason else f": {REMEDY} by the same command"
    return ValueError(f"expected {form.title} ({form.name}), got {path} with {reason}{advice}")


def read_header(path: Path, form: Format) -> tuple[Any, int]:
    """The header of a file and its number of rows.

    Raises:
        ValueError, OSError: as `open_parquet`.
    """
    with open_parquet(path, form) as (header, file):
        return header, file.metadata.num_rows


def no_tensors(header: Any) -> dict[str, Any]:
    """The tensors of a format that has none."""
    return {}
