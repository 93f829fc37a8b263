"""`clipkernels show`: a picture of the patches that methods leave of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import click
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader

from clipkernels.cli.parts.images import close, exif_option, find, no_images
from clipkernels.cli.parts.methods import METHOD_HELP, methods_for, name_of
from clipkernels.cli.parts.models import cast_towers, choose_device, load, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    device_option,
    format_option,
    limit_option,
    output_option,
    precision_option,
    predictor_option,
    shuffle_option,
    tokens_option,
)
from clipkernels.cli.parts.output import (
    PathCell,
    check_file,
    opened,
    progress,
    refuse_same,
    schedule,
    write_results,
)
from clipkernels.comparison.towers import DTYPES
from clipkernels.images import draw_images
from clipkernels.images.batches import Loaded, Pictures, collate, image_shape
from clipkernels.measure.timing import plan_for
from clipkernels.messages import printable, quantity, skip_message
from clipkernels.methods import Dense
from clipkernels.patching import method_of, tower_of
from clipkernels.pictures.files import check_suffix, save_picture
from clipkernels.pictures.moves import measure_moves
from clipkernels.pictures.show import MAX_WORST, check_counts, draw_moves

MIN_IMAGES_FOR_WORKERS = 256

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels show pictures/digits/three/0035.png --method tome:8 \\
    --method evit:0.7 --out kept.png
  clipkernels show pictures --worst 8 --method tome:8 --out worst.png
"""


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="The picture: a .png, .jpg or .webp.")
@click.option(
    "--method",
    "specs",
    multiple=True,
    metavar="SPEC",
    help=f"{METHOD_HELP} May be repeated.  [default: that of a folder of ck.save, else tome at the cost of "
    "evit:0.7, evit:0.7 and evit:0.5]",
)
@predictor_option
@tokens_option
@click.option(
    "--worst",
    type=click.IntRange(1, MAX_WORST),
    metavar="N",
    help=f"Show the N images whose embedding moved most, at most {MAX_WORST}.  [default: all images, at most 16]",
)
@click.option("--all-steps", is_flag=True, help="Show the patches after every block that has a step.")
@model_options
@limit_option()
@shuffle_option
@exif_option
@batch_size_option(32)
@device_option
@precision_option
@format_option
@output_option
@click.pass_context
def show(
    context: click.Context,
    images: tuple[str, ...],
    out: str,
    specs: tuple[str, ...],
    predictor: str | None,
    tokens: str | None,
    worst: int | None,
    all_steps: bool,
    library: str,
    name: str | None,
    pretrained: str | None,
    limit: int | None,
    shuffle: int | None,
    no_exif: bool,
    batch_size: int,
    device: str | None,
    precision: str,
    form: str,
    output: str | None,
) -> None:
    """Draw which patches of an image every method keeps, merges, fuses or drops.

    The image appears as the tower sees it. A kept patch shows its own pixels; the patches of a merged token have their
    mean colour and one outline; fused patches are hatched, and dropped ones blank. One image has a row per method, with
    its patches after at most four of the blocks; several images have a row each, with what every method leaves.

    IMAGES are files, folders or quoted globs, as in classify, with its limits of size and format. Each row of the
    results is an image under a method, with the tokens and the cosine of the embedding with the dense one. A file that
    cannot be read as an image is reported on stderr and skipped, and the exit status is then 1.
    """
    try:
        refuse_same({"--out": out, **({"--output": output} if output not in (None, "-") else {})})
        check_suffix(out)
        check_file(out, "--out")
        found = find(images)
        paths = draw_images(found.paths, limit, shuffle)
        check_counts(len(paths), worst)
        where = choose_device(device)
        model, preprocess, _ = load(library, name, pretrained)
        model = cast_towers(model, where, DTYPES[precision])
        tower = tower_of(model)
        asked = {"", *(spec.partition(":")[0] for spec in specs)}
        dense = {name_of(None): "none", name_of(Dense()): "dense"}
        own = method_of(model)
        known = methods_for(tower, specs, predictor, tokens, None if isinstance(own, Dense) else own)
        methods = {name: method or Dense() for name, method in known.items() if dense.get(name, "") in asked}
        dataset = Pictures(paths, preprocess, image_shape(model, preprocess), exif=not no_exif)
        workers = min(4, os.cpu_count() or 1) if len(paths) >= MIN_IMAGES_FOR_WORKERS else 0
        loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate)
        with progress() as bar, opened(output) as stream:
            task = bar.add_task("comparing", total=len(paths))

            def report(batch: Loaded) -> None:
                for index, reason in batch.failed:
                    bar.console.print(Text(skip_message(paths[index], reason)), soft_wrap=True)
                bar.advance(task, len(batch.indices) + len(batch.failed))

            moves = measure_moves(model, loader, methods, report)
            if not moves.indices:
                raise no_images(paths)
            shown = moves if worst is None else moves.worst(worst)
            save_picture(draw_moves(model, dataset, shown, methods, paths, all_steps), out)
            counts = {name: plan_for(tower, method).tokens for name, method in methods.items()}
            records = [
                {"path": paths[index], "method": name, "tokens": counts[name][-1], "cosine": round(cosine, 6)}
                for index, cosines in zip(shown.indices, shown.cosines.tolist(), strict=True)
                for name, cosine in zip(methods, cosines, strict=True)
            ]
            write(records, counts, {"picture": out, "images": len(moves.indices)}, form, stream)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    skipped = [f"{quantity(len(moves.failed), 'file')} skipped"] if moves.failed else []
    content = f"{len(shown.indices)} of {quantity(len(moves.indices), 'image')}"
    click.echo("; ".join([f"{printable(out)} shows {content}", *skipped]), err=True)
    close(found)
    if moves.failed:
        context.exit(1)


def write(
    records: Sequence[dict[str, Any]],
    counts: dict[str, tuple[int, ...]],
    about: dict[str, Any],
    form: str,
    stream: TextIO,
) -> None:
    """Write the rows as a table, as JSON with the name of the picture, or as CSV."""

    def draw() -> Iterator[Table]:
        table = Table("path", "method", "tokens", "cosine")
        for row in records:
            cells = (row["method"], schedule(counts[row["method"]]), f"{row['cosine']:.4f}")
            table.add_row(PathCell(printable(row["path"])), *map(Text, cells))
        yield table

    write_results(form, stream, records, {**about, "rows": list(records)}, draw)
