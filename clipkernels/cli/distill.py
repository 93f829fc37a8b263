"""`clipkernels distill`: CLIP-TD's protocol on VQA v2, SNLI-VE or VCR, from annotation files to a table."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, get_args

import click
import torch

from clipkernels.cli.parts.distill_report import FILES, draw, markdown, records_of, subset_notes
from clipkernels.cli.parts.models import BUNDLED_NOTE, choose_device, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    choose_names,
    default_workers,
    device_option,
    format_option,
    once,
    threads_option,
    workers_option,
)
from clipkernels.cli.parts.output import check_out, opened, write_report_files, write_results
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.measure.environment import environment
from clipkernels.messages import list_items, quantity, skip_message
from clipkernels.questions.examples import FIELDS, SPLITS, TASKS, ExampleSet, read_examples, vqa_classes
from clipkernels.questions.learners import Tuned
from clipkernels.questions.plan import METHODS, Options, Plan
from clipkernels.questions.protocol import run_protocol
from clipkernels.questions.results import Progress
from clipkernels.questions.subsets import held_out_values
from clipkernels.questions.vqa import read_vqa
from clipkernels.run_folder import RUN

STATE = "state"
POSITIVE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(min=0, max=1, min_open=True)
MAX_NAMED = 10
"""Images that cannot be read and are named."""
EXAMPLE = """\b
Example:
  clipkernels distill snli_ve --task snli-ve --images snli_ve/images \\
    --shares 10,100 --seeds 1 --methods none,targeted --steps 20 --out out
"""


@click.command(epilog=EXAMPLE)
@click.argument("annotations", type=click.Path(exists=True, file_okay=False))
@click.option("--task", type=click.Choice(TASKS), required=True, help="The task whose files ANNOTATIONS has.")
@click.option(
    "--images",
    "images_folder",
    required=True,
    type=click.Path(exists=True, file_okay=False),
    help="Folder of the images.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the results and their state.")
@click.option("--train", "train_split", help="Split to learn from.  [default: train2014 of vqa, else train]")
@click.option("--test", "test_split", help="Split to score.  [default: val2014 of vqa, test of snli-ve, val of vcr]")
@once(
    "--shares",
    metavar="PERCENT,…",
    default="1,5,10,20,50,100",
    show_default=True,
    help="Shares of the labels, in percent.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Draws of the labels, orders and first weights.",
)
@once("--methods", metavar="NAME,…", default=",".join(METHODS), show_default=True, help="Methods to train and compare.")
@click.option(
    "--student", metavar="MODULE:CLASS", help="Class of the student, found on the path.  [default: a small transformer]"
)
@click.option(
    "--finetune",
    "tuned",
    type=click.Choice(get_args(Tuned)),
    default="mlp",
    show_default=True,
    help="Method finetune: a head on frozen features, or CLIP whole.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=2),
    default=3000,
    show_default=True,
    help="vqa: most frequent answers that are classes.",
)
@once(
    "--shift",
    metavar="FIELD[=VALUE,…]",
    help="Hold a domain out of the training and score it apart: question_type or answer_type of vqa, movie or source "
    "of vcr. Without values, some are drawn that have at least a quarter of the annotations.",
)
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True, help="Most steps of a training.")
@batch_size_option(64, "Annotations per step.")
@click.option("--lr", type=POSITIVE, default=1e-3, show_default=True, help="Largest learning rate but of CLIP whole.")
@click.option(
    "--strength", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Weight λ of the distillation."
)
@click.option("--keep", type=SHARE, default=0.4, show_default=True, help="targeted: share κ of the tokens.")
@click.option("--temperature", type=POSITIVE, default=0.07, show_default=True, help="targeted: t of the relevance.")
@model_options
@workers_option()
@device_option
@threads_option
@format_option
@click.pass_context
def distill(
    context: click.Context,
    annotations: str,
    task: str,
    images_folder: str,
    out: str,
    train_split: str | None,
    test_split: str | None,
    shares: str,
    seeds: int,
    methods: str,
    student: str | None,
    tuned: Tuned,
    vocabulary: int,
    shift: str | None,
    steps: int,
    batch_size: int,
    lr: float,
    strength: float,
    keep: float,
    temperature: float,
    library: str,
    name: str | None,
    pretrained: str | None,
    workers: int | None,
    device: str | None,
    threads: int | None,
    form: str,
) -> None:
    """Train students on shares of the labels, with and without distillation from a CLIP, and score them.

    ANNOTATIONS is the folder of the task's own files, as they are published. vqa:
    v2_OpenEnded_mscoco_SPLIT_questions.json and v2_mscoco_SPLIT_annotations.json. snli-ve: snli_ve_SPLIT.jsonl. vcr:
    SPLIT.jsonl. Nothing is downloaded.

    Methods: none, the student alone; plain, distillation of all tokens alike; targeted, of the tokens that CLIP finds
    relevant, weighted by its confidence against the student's (CLIP-TD, a reconstruction); finetune, CLIP itself with
    a head. Shares of one seed are nested and keep every class as far as they can. The gains are against none.

    OUT gets results.csv, results.json and results.md with the trainings of this command. OUT/state keeps every score
    and a checkpoint, about once a minute, OUT/features the teacher's features: the same command goes on after
    Ctrl-C or a kill, and with more shares, seeds or methods it trains only what is new. An image that is missing or
    cannot be read is left out with its annotations; the exit status is 1 if one cannot be read.
    """
    began, before = time.monotonic(), torch.get_num_threads()
    folder = Path(os.path.abspath(out))
    try:
        torch.set_num_threads(threads or before)
        check_out(folder, FILES, f"{STATE}/{RUN}", "a distillation")
        chosen, parts = choose_names(methods, "--methods", METHODS), choose_shares(shares)
        count = default_workers() if workers is None else workers
        options = Options(
            student, tuned, steps, batch_size, lr, strength=strength, keep=keep, temperature=temperature, workers=count
        )
        where = choose_device(device)
        first, second = (given or usual for given, usual in zip((train_split, test_split), SPLITS[task], strict=True))
        classes = vqa_classes(read_vqa(annotations, first), vocabulary) if task == "vqa" else ()
        train_set, test_set = (
            read_examples(task, annotations, images_folder, split, classes) for split in (first, second)
        )
        field, held_out = choose_domain(shift, task, train_set, test_set)
        plan = Plan(train_set, test_set, chosen, parts, seeds, field, held_out)
        if name is None:
            click.echo(BUNDLED_NOTE, err=True)
        model, preprocess, tokenizer = load_clip(library, name, pretrained)
        model = model.to(where).eval()
        with stopping("batch") as stop, Reporter(stop, "encoding") as report:
            results = run_protocol(
                plan, model, preprocess, tokenizer, options, folder, lambda progress: show(report, progress)
            )
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)
    if results.stopped:
        click.echo(f"stopped in {report.activity}; the same command goes on", err=True)
        context.exit(128 + stop[0])
    for path, reason in list(results.unread.items())[:MAX_NAMED]:
        click.echo(skip_message(path, reason), err=True)
    if len(results.unread) > MAX_NAMED:
        click.echo(f"skipped {len(results.unread) - MAX_NAMED} more", err=True)
    records = records_of(results.rows)
    notes = [
        *results.notes, *subset_notes(results.rows),
        "mean: over seeds. gain: over none, seed by seed. The objective is a reconstruction of CLIP-TD's.",
        *([f"left out {quantity(len(results.unread), 'image')} that cannot be read"] if results.unread else []),
    ]  # fmt: skip
    title = f"{task}, teacher {name or 'the bundled CLIP'}, student {student or 'the small transformer'}"
    document: dict[str, Any] = {
        "environment": environment(), "task": task, "train": first, "test": second, "model": name or "bundled",
        "pretrained": pretrained, "library": library, "options": options._asdict(), "vocabulary": vocabulary,
        "held_out": {field: list(held_out)} if held_out else {}, "notes": notes, "rows": records,
    }  # fmt: skip
    write_report_files(folder, records, document, markdown(records, notes, title))
    with opened(None) as stream:
        write_results(form, stream, records, document, lambda: draw(records, notes, title))
    trained = quantity(len(chosen) * len(parts) * seeds, "training")
    click.echo(f"{trained} in {duration(time.monotonic() - began)}: {folder / 'results.md'}", err=True)
    if results.unread:
        context.exit(1)


def choose_shares(text: str) -> list[float]:
    """Return --shares as shares in (0, 1], ascending; click.UsageError for anything else."""
    shares = []
    for part in text.split(","):
        try:
            percent = float(part)
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise click.UsageError(f"expected --shares in percent such as 1,10,100, got {part.strip()!r}")
        shares.append(percent / 100)
    return sorted(set(shares))


def choose_domain(
    text: str | None, task: str, train_set: ExampleSet, test_set: ExampleSet
) -> tuple[str, tuple[str, ...]]:
    """Return the field of --shift and the values of it that are held out; "" and () without it.

    Values that are drawn occur in both splits. They are sorted, because a run is the same in any order of its values.

    Raises:
        click.UsageError: no such field or value.
        ValueError: fewer than two values that occur in both splits.
    """
    if text is None:
        return "", ()
    field, _, values = text.partition("=")
    if field not in FIELDS[task]:
        fields = " or ".join(FIELDS[task]) or "no --shift, because its files have no field for it"
        raise click.UsageError(f"expected {fields} for {task}, got --shift {field}")
    tested = set(test_set.values(field))
    common = [value for value in train_set.values(field) if value in tested]
    if not values:
        return field, held_out_values(common, 0.25, 0)
    chosen = tuple(sorted({value.strip() for value in values.split(",")}))
    unknown = [value for value in chosen if value not in tested]
    if unknown:
        raise click.UsageError(
            f"expected values of {field} in the test split, such as {list_items(sorted(tested))}, got {unknown[0]!r}"
        )
    return field, chosen


def show(report: Reporter, progress: Progress) -> bool:
    """Show how far a run is; return true once a signal has come."""
    report.begin(progress.phase)
    report.item = progress.item
    return report(progress)
