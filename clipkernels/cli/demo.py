"""`clipkernels demo`: cost, speed and accuracy of every method, on the bundled model and one full-size tower."""

from __future__ import annotations

import os

import click

from clipkernels.cli.parts.options import format_option, output_option, precision_option, seed_option

EXAMPLE = """\b
Example:
  clipkernels demo --quick --format csv --output demo.csv
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--model", default="ViT-B-16", show_default=True, help="Full-size open_clip tower, a folder of ck.save, or none."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@precision_option
@seed_option("images, weights and order")
@click.option("--quick", is_flag=True, help="Few images and rounds: a test that everything runs, not a measurement.")
@click.option("--save-images", type=click.Path(file_okay=False), help="Also write the images here, a folder per class.")
@format_option
@output_option
def demo(
    model: str,
    threads: int | None,
    precision: str,
    seed: int,
    quick: bool,
    save_images: str | None,
    form: str,
    output: str | None,
) -> None:
    """Measure speed and accuracy of every method, with nothing downloaded.

    The small bundled CLIP classifies held-out digits and scenes. One full-size tower with random weights shows
    the speed, because the small one has too few tokens for that; a folder of ck.save runs its own method there.
    """
    # Before the imports, which take seconds without a sign of life.
    weights = "" if os.path.isdir(model) else " with random weights"
    tower = "" if model == "none" else f" and {model}{weights}"
    duration = "less than a minute" if quick or model == "none" else "one to five minutes"
    click.echo(f"Timing the bundled CLIP{tower}, dense and with every method: {duration} on a CPU.", err=True)
    from clipkernels.cli.parts import demo_tables

    demo_tables.run(model, threads, precision, seed, quick, save_images, form, output)
