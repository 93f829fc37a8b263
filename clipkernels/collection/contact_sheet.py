"""A contact sheet of hits: a grid of thumbnails with rank, score and id."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

from clipkernels.collection.manifest import Manifest
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.search import Hit
from clipkernels.collection.sources import Source, find_sources
from clipkernels.images import Reader
from clipkernels.messages import first_line, list_names, printable
from clipkernels.pictures.files import GREY, PAPER, write

ReadImage = Callable[[str], bytes | str]
"""A function from an id to the content of its image, or the reason why there is none."""

MAX_HITS = 100
THUMBNAIL, MARGIN, CAPTION = 200, 12, 36  # pixels
MAX_COLUMNS = 5
CHARACTERS = 32
"""Characters of an id or a reason in a line."""


def image_reader(manifest: Manifest, ids: Sequence[str]) -> ReadImage:
    """The images of a collection by their ids, as the sources that the manifest names have them now.

    Args:
        manifest: of the collection.
        ids: the ids that will be read.
    """
    pa, settings, count = pyarrow(), manifest.settings, len(set(ids))
    wanted = pa.array(ids, pa.string())
    places: dict[str, tuple[Source, int]] = {}
    for name in manifest.sources:
        with suppress(ValueError, OSError):  # a source that is gone, or empty
            if len(places) == count:
                break
            [source] = find_sources([name], image_column=settings.image_column, id_column=settings.id_column)
            for batch in source.list():
                if len(places) == count:
                    break
                rows = batch.filter(pa.compute.is_in(batch["id"], value_set=wanted))
                for key, place in zip(rows["id"].to_pylist(), rows["place"].to_pylist(), strict=True):
                    places.setdefault(key, (source, place))

    def read(key: str) -> bytes | str:
        if key not in places:
            return f"not in {list_names(manifest.sources)}"
        source, place = places[key]
        [item] = source.fetch([key], [place], [])
        return item if isinstance(item, str) else item.content

    return read


def draw_hits(hits: Sequence[Hit], read: ReadImage, rules: str) -> Image.Image:
    """A picture (RGB) of the first hits, at most MAX_HITS, five in a row; a hit without an image shows the reason.

    Args:
        hits: as `search` returns them.
        read: gives the content of an image by its id.
        rules: the rules that images are read by, as `Reader.rules`.
    """
    hits = hits[:MAX_HITS]
    columns = max(1, min(MAX_COLUMNS, math.ceil(math.sqrt(len(hits)))))
    rows = max(1, math.ceil(len(hits) / columns))
    width, height = THUMBNAIL + MARGIN, THUMBNAIL + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, hit in enumerate(hits):
        x, y = MARGIN + place % columns * width, MARGIN + place // columns * height
        thumbnail = _thumbnail(read(hit.id), Reader.of(rules))
        if isinstance(thumbnail, str):
            pen.rectangle((x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1), fill=GREY)
            lines = textwrap.wrap(printable(thumbnail), CHARACTERS - 4, max_lines=8, placeholder="...")
            write(pen, font, (x + MARGIN, y + MARGIN), "\n".join(lines))
        else:
            left, top = (THUMBNAIL - thumbnail.width) // 2, (THUMBNAIL - thumbnail.height) // 2
            sheet.paste(thumbnail, (x + left, y + top))
        write(pen, font, (x, y + THUMBNAIL + 4), f"{hit.rank}   {hit.score:.4f}\n{_shorten(printable(hit.id))}")
    return sheet


def _thumbnail(content: bytes | str, reader: Reader) -> Image.Image | str:
    """An image within THUMBNAIL pixels, or the reason why there is none."""
    if isinstance(content, str):
        return content
    try:
        image = reader.decode(io.BytesIO(content))
    except Exception as error:  # Pillow's decoders raise exceptions of many kinds
        return first_line(error)
    scale = THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def _shorten(name: str) -> str:
    """A name whose start is left out if it is too long for a line, because names differ at the end."""
    return name if len(name) <= CHARACTERS else f"...{name[3 - CHARACTERS :]}"
