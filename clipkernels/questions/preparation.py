"""The teacher's features of everything that a run reads, in its cache before the first training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

from clipkernels.adapters.tokenizers import find_cut, ids_of
from clipkernels.classifier import PROMPTS_PER_BATCH
from clipkernels.files import stamp_of
from clipkernels.images.batches import Pictures, collate
from clipkernels.images.loaders import Loader
from clipkernels.learn.distill import TeacherCache
from clipkernels.learn.distill.feature_files import content_hash
from clipkernels.questions.batches import ExampleBatches, TextTokens
from clipkernels.questions.plan import Options, Plan

MARKS = 8
"""Most tokens that a tokenizer adds to a text."""
Report = Callable[[str, int, int, str], None]
"""Called with the phase, the items that are done, all items and the noun of what is counted; it may raise."""


def encode_texts(
    plan: Plan, options: Options, train: ExampleBatches, test: ExampleBatches, cached: TeacherCache, report: Report
) -> None:
    """Encode the texts that the methods of a plan need.

    Args:
        plan, options: the trainings and their settings.
        train, test: both sets, which make the texts.
        cached: the teacher's cache.
        report: the progress.
    """
    head = "finetune" in plan.methods and options.tuned != "full"
    detailed: dict[str, None] = {}
    short: dict[str, None] = {}
    for source in (train, test):
        for example in source.examples.examples:
            if plan.distils and source is train and example.label >= 0:
                detailed[source.distilled_text(example)] = None
                short.update(dict.fromkeys(source.candidate_texts(example)))
            if head:
                short.update(dict.fromkeys(source.texts_of(example)))
    total = len(detailed) + len(short)

    def count(before: int, kind: str, done: int, new: int) -> None:
        report("encoding texts", before + done, total, "text")

    cached.add(texts=detailed, words=True, progress=partial(count, 0))
    cached.add(texts=short, words=False, progress=partial(count, len(detailed)))


def encode_images(
    pictures: Pictures,
    split: str,
    regions: bool,
    options: Options,
    cached: TeacherCache,
    unread: dict[str, str],
    report: Report,
) -> tuple[dict[str, str], str]:
    """Encode images; return the reasons for those that cannot be read, by path, and a digest of the content of all.

    Args:
        pictures: the images.
        split: their name in the progress.
        regions: also encode their patches.
        options: the size of a batch, and the loader processes.
        cached: the teacher's cache.
        unread: gets the images that cannot be read, as they are met.
        report: the progress.
    """
    loader: Loader[Any] = Loader(pictures, options.workers, batch_size=options.batch_size, collate_fn=collate)
    failed: dict[str, str] = {}
    content = sha256()
    done = 0
    for batch in loader:
        failed |= {pictures.paths[index]: reason for index, reason in batch.failed}
        unread |= failed
        if batch.images is not None:
            cached.add(images=[batch.images], regions=regions)
            for image in batch.images:
                content.update(content_hash(image))
        content.update(repr([index for index, _ in batch.failed]).encode())
        done += len(batch.indices) + len(batch.failed)
        report(f"encoding {split} images", done, len(pictures), "image")
    return failed, content.hexdigest()


def files_digest(paths: Sequence[str]) -> str:
    """A digest of the paths, sizes and times of files, which changes when one is written anew."""
    digest = sha256()
    for path in paths:
        digest.update(repr((path, *stamp_of(path))).encode())
    return digest.hexdigest()


def count_cut(source: ExampleBatches, tokens: TextTokens, length: int, split: str, report: Report) -> int:
    """The number of distinct texts of a set whose end a tokenizer cuts off.

    Args:
        source: the set, which makes the texts.
        tokens: the tokenizer.
        length: tokens of a text.
        split, report: the name of the set in the progress, and the progress.
    """
    every = dict.fromkeys(text for example in source.examples.examples for text in source.texts_of(example))
    # A token is a byte or more, and few tokens mark the start and the end.
    long = [text for text in every if len(text.encode()) + MARKS > length]
    cut = 0
    for start in range(0, len(long), PROMPTS_PER_BATCH):
        texts = long[start : start + PROMPTS_PER_BATCH]
        cut += len(find_cut(tokens.tokenizer, texts, ids_of(tokens.tokenizer, texts, tokens.context), tokens.context))
        report(f"measuring {split} texts", start + len(texts), len(long), "text")
    return cut
