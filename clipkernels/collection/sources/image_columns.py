"""The column of a table that holds images: their bytes, their paths, or a struct of both as `datasets` writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.folder import read_item
from clipkernels.collection.sources.items import Item, escape
from clipkernels.images import is_image_name
from clipkernels.images.reader import MAX_BYTES
from clipkernels.messages import list_names, printable, reason_of

if TYPE_CHECKING:
    import pyarrow as pa


class ImageColumn(NamedTuple):
    """A column of images: its name, and the form of its cells."""

    name: str
    form: Literal["bytes", "path", "struct"]

    @property
    def leaves(self) -> list[str]:
        """The leaves of the column, as Parquet names them."""
        return [f"{self.name}.bytes", f"{self.name}.path"] if self.form == "struct" else [self.name]

    @property
    def path_leaf(self) -> str | None:
        """The leaf that holds the paths."""
        return {"bytes": None, "path": self.name, "struct": f"{self.name}.path"}[self.form]


def find_image_column(
    where: str, schema: pa.Schema, name: str | None, first_text: Callable[[str], str | None]
) -> ImageColumn:
    """The column of images of a table.

    Args:
        where: the table, for errors.
        schema: its schema.
        name: the column, if the user names it.
        first_text: a function that returns the first text of a column of strings.
    Raises:
        ValueError: no such column, or several without a name.
    """
    forms = {field.name: form for field in schema if (form := _form(field.type))}
    if name is not None:
        if name not in forms:
            columns = list_names([*schema.names]) or "none"
            problem = "which is not there" if name not in schema.names else f"of type {schema.field(name).type}"
            raise ValueError(f"expected a column of images in {where} ({columns}), got {name!r}, {problem}")
        return ImageColumn(name, forms[name])
    candidates = [column for column, form in forms.items() if form != "path"]
    if not candidates:
        candidates = [column for column in forms if _is_path(first_text(column))]
    if len(candidates) != 1:
        columns = list_names(candidates or list(schema.names)) or "no columns"
        raise ValueError(
            f"expected one column of images (bytes, or paths of images) in {printable(where)}, got "
            f"{len(candidates)}: name one of {columns} by image_column"
        )
    return ImageColumn(candidates[0], forms[candidates[0]])


def read_cell(cell: Any, column: ImageColumn, base: str, stamp: tuple[int, int]) -> Item | str:
    """The image of a cell, or the reason why it has none.

    Args:
        cell: the value of the column: bytes, a path or a dict.
        column: the column.
        base: the folder that paths are relative to.
        stamp: size and time of the table's file, which stamp the bytes in it; a path is stamped by its own file.
    """
    content, path = cell, cell if column.form == "path" else None
    if column.form == "struct":
        content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if column.form != "path" and content is not None:
        return Item(content, *stamp, {}) if len(content) <= MAX_BYTES else f"larger than {MAX_BYTES // 2**20} MiB"
    if path is None:
        return "no image in the table (null)"
    try:
        item = read_item(os.path.join(base, path))
    except Exception as error:
        return reason_of(error)
    return item if column.form == "path" else Item(item.content, *stamp, {})


def is_text(kind: pa.DataType) -> bool:
    """Return true for strings, also large ones and those in a dictionary."""
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def row_keys(name: str, row: int, count: int) -> list[str]:
    """The ids of consecutive rows of a table that has neither ids nor paths: "name/row"."""
    prefix = escape(name)
    return [f"{prefix}/{index}" for index in range(row, row + count)]


def ids_of(column: pa.Array, name: str, where: str, row: int) -> list[str]:
    """The ids in a column of strings or integers.

    Args:
        column: the cells from `row` on.
        name: the column's name.
        where: the table, for errors.
        row: the first row.
    Raises:
        ValueError: a null.
    """
    texts = (column if is_text(column.type) else column.cast(pyarrow().string())).to_pylist()
    if None in texts:
        place = f"{printable(where)}, row {row + texts.index(None)}"
        raise ValueError(f"expected an id in each row, got null in {name!r} of {place}")
    return texts


def check_id_column(where: str, schema: pa.Schema, name: str) -> None:
    """Check that a column of ids exists and holds strings or integers.

    Raises:
        ValueError: it does not.
    """
    if name not in schema.names:
        raise ValueError(
            f"expected a column of ids in {printable(where)} ({list_names(list(schema.names))}), got {name!r}"
        )
    kind = schema.field(name).type
    if not is_text(kind) and not pyarrow().types.is_integer(kind):
        raise ValueError(f"expected ids that are strings or integers in {printable(where)}, got {name!r} of {kind}")


def plain_types(schema: pa.Schema, without: Sequence[str]) -> dict[str, pa.DataType]:
    """The types of a table's other columns: of a dictionary, that of its values; of large strings, that of strings."""
    pa = pyarrow()
    types = {}
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.name not in without:
            types[field.name] = pa.string() if is_text(kind) else pa.binary() if _is_bytes(kind) else kind
    return types


def _form(kind: pa.DataType) -> Literal["bytes", "path", "struct"] | None:
    types = pyarrow().types
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return "struct" if {"bytes", "path"} <= set(names) and _is_bytes(kind.field("bytes").type) else None
    if _is_bytes(kind):
        return "bytes"
    return "path" if is_text(kind) else None


def _is_bytes(kind: pa.DataType) -> bool:
    types = pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind) or str(kind) == "binary_view"


def _is_path(text: str | None) -> bool:
    return text is not None and "://" not in text and is_image_name(os.path.basename(text))
