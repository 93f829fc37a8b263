"""`clipkernels search`: the images of a collection that are most similar to a text or an image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec
import torch
from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.methods import METHOD_HELP, read_methods
from clipkernels.cli.parts.models import cast_towers, choose_device, load, load_clip
from clipkernels.cli.parts.options import device_option, format_option, once, output_option
from clipkernels.cli.parts.output import PathCell, check_file, opened, refuse_same, write_results
from clipkernels.collection.contact_sheet import MAX_HITS, draw_hits, image_reader
from clipkernels.collection.manifest import Manifest, read_manifest
from clipkernels.collection.query import BUNDLED, load_recorded, recorded_schedule
from clipkernels.collection.search import Hit
from clipkernels.collection.search import search as find
from clipkernels.messages import first_line, printable, quantity
from clipkernels.methods import Method
from clipkernels.patching import patch, unpatch
from clipkernels.pictures.files import check_suffix, save_picture

MAX_CAPTION = 80
"""Characters of a caption in a table."""
EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels embed pictures --out collection
  clipkernels search collection "the handwritten digit three" -k 5
  clipkernels search collection --image pictures/digits/three/0035.png \\
    --picture hits.png
"""


@click.command(epilog=EXAMPLE)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("text", required=False)
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="Search with this image, not with a text.")
@once(
    "--method",
    "spec",
    metavar="SPEC",
    help=f"Of a query image: {METHOD_HELP}  [default: that of the collection]",
)
@click.option("-k", type=click.IntRange(min=1), default=20, show_default=True, help="Number of hits.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False),
    help="Also draw the hits, as thumbnails, into this .png, .jpg or .webp.",
)
@device_option
@format_option
@output_option
def search(
    folder: str,
    text: str | None,
    image: str | None,
    spec: str | None,
    k: int,
    picture: str | None,
    device: str | None,
    form: str,
    output: str | None,
) -> None:
    """Search a collection with a text or an image.

    DIR is a folder of clipkernels embed, TEXT the query. Each row has rank, cosine and id of a hit, the most similar
    one first; csv and json rows have the columns of the collection too.

    The query is encoded with the model, the precision and the method of the collection. The index is kept in DIR/index
    and made again when the collection has changed.
    """
    try:
        manifest = read_manifest(folder)
        refuse_same({"--picture": picture, **({"--output": output} if output not in (None, "-") else {})})
        if picture is not None:
            check_suffix(picture)
            check_file(picture, "--picture")
        if (text is None) == (image is None):
            raise click.UsageError(f"expected a text or --image, got {'neither' if text is None else 'both'}")
        if spec is not None:
            if image is None:
                raise click.UsageError(f"expected --image with --method {spec}, got a text")
            manifest = msgspec.structs.replace(manifest, spec=spec, schedule=msgspec.UNSET)
        model, preprocess, tokenizer = load_model(folder, manifest, choose_device(device), image is not None)
        with opened(output) as stream:
            options: dict[str, Any] = {"model": model, "preprocess": preprocess, "tokenizer": tokenizer}
            hits = find(folder, text, image=image, k=k, **options)
            write(hits, {"folder": folder, "text": text, "image": image}, form, stream)
        if picture is not None:
            save_picture(
                draw_hits(hits, image_reader(manifest, [hit.id for hit in hits[:MAX_HITS]]), manifest.settings.reader),
                picture,
            )
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{quantity(len(hits), 'hit')} in {printable(folder)}", err=True)
    if picture is not None and len(hits) > MAX_HITS:
        click.echo(f"{picture} shows the first {MAX_HITS}", err=True)


def load_model(folder: str, manifest: Manifest, device: torch.device, for_image: bool) -> tuple[Any, Any, Any]:
    """Return the model that made a collection, patched with its method, its preprocessing and its tokenizer.

    A method that cannot be applied to it is left out, with a warning if an image is to be encoded.

    Raises:
        click.UsageError, click.ClickException: as in `load_clip`, or a model that has no name.
    """
    settings = manifest.settings
    tokenizer: Any = None
    if (settings.library, settings.model, settings.pretrained) == BUNDLED:
        model, preprocess, tokenizer = load_recorded(manifest, device)
    elif settings.library is None or settings.model is None:
        expected = "expected a collection whose model has a name"
        raise click.UsageError(f"{expected}, got {folder}, made from Python: search with clipkernels.search")
    elif settings.library == "timm" and not for_image:
        expected = f"expected --image for a collection of timm's {settings.model}"
        raise click.UsageError(f"{expected}, which has no text tower, got a text")
    elif for_image:
        model, preprocess, _ = load(settings.library, settings.model, settings.pretrained)
    else:
        model, preprocess, tokenizer = load_clip(settings.library, settings.model, settings.pretrained)
    model = cast_towers(model, device, getattr(torch, settings.precision))
    if for_image and (manifest.spec is not None or manifest.schedule is not msgspec.UNSET):
        try:
            method: Method | None = recorded_schedule(manifest)  # whose file may be gone
            if method is None:
                [method] = read_methods([str(manifest.spec)], None, None)
            model = unpatch(model) if method is None else patch(model, method)
        except (click.UsageError, ValueError) as error:
            reason = error.format_message() if isinstance(error, click.UsageError) else first_line(error)
            warnings.warn(f"the method of {folder}, {settings.method}, cannot be applied: {reason}", stacklevel=2)
    return model, preprocess, tokenizer


def write(hits: Sequence[Hit], query: dict[str, Any], form: str, stream: Any) -> None:
    """Write hits as a table, as JSON with the query, or as CSV."""
    records = [
        {"rank": hit.rank, "id": hit.id, "score": round(hit.score, 6), **{k: plain(v) for k, v in hit.values.items()}}
        for hit in hits
    ]

    def draw() -> Iterator[Table]:
        captions = any("text" in hit.values for hit in hits)
        table = Table("rank", "score", "id", *(["text"] if captions else []))
        for hit in hits:
            cells = [Text(shorten_caption(str(hit.values["text"] or "")))] if captions else []
            table.add_row(str(hit.rank), f"{hit.score:.4f}", PathCell(printable(hit.id)), *cells)
        yield table

    if form == "csv" and not records:
        stream.write("rank,id,score\n")
    else:
        write_results(form, stream, records, {**query, "hits": records}, draw)


def shorten_caption(caption: str) -> str:
    """Return the start of a caption in one line; csv and json have all of it."""
    text = printable(caption[: MAX_CAPTION + 1])
    return text if len(text) <= MAX_CAPTION else f"{text[: MAX_CAPTION - 1]}…"


def plain(value: Any) -> Any:
    """Return a value of a column as JSON can hold it; what it cannot hold becomes text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
