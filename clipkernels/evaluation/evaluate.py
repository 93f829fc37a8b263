"""`evaluate`: every data set, method, head and number of shots, scored from features that are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from clipkernels.adapters import find_resnet
from clipkernels.evaluation.classification import score_data, support_of
from clipkernels.evaluation.datasets import Dataset
from clipkernels.evaluation.features import forget_keys
from clipkernels.evaluation.heads import HEADS
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Progress, Results
from clipkernels.evaluation.retrieval import score_captions
from clipkernels.evaluation.run import Run, Stopped
from clipkernels.evaluation.shots import shortage_note
from clipkernels.evaluation.state import FOLDER, Settings
from clipkernels.fingerprint import fingerprint
from clipkernels.images import Reader
from clipkernels.messages import list_names
from clipkernels.patching import unpatch
from clipkernels.support.features import encoder_of


def evaluate(combinations: Combinations, model: Model, folder: Path, progress: Callable[[Progress], bool]) -> Results:
    """The scores of every combination; features and scores that are in the folder are not made again.

    Args:
        combinations: what is scored.
        model: the model, which is unpatched afterwards.
        folder: the folder of the state. Later runs may have other combinations, but not another model.
        progress: called with the progress; a true result stops the run, and the same call goes on.
    Raises:
        ValueError: a data set without a test split, a support set of other classes; a folder that holds something
            else, or the state of other settings; a split without an image that can be read.
        OSError: the folder cannot be read or written.
    """
    for data in combinations.data:
        if "test" not in data.splits:
            names = list_names(list(data.splits))
            raise ValueError(f"expected a test split of {data.name}, got {names} alone: complete the data")
        support_of(combinations, data)
    forget_keys()
    if find_resnet(model.model) is None:
        unpatch(model.model)
    encoder = encoder_of(model.model, model.preprocess, Reader())
    settings = Settings(
        tower=fingerprint(model.model), text_tower=fingerprint(model.model, "text"), preprocess=encoder.preprocess,
        reader=encoder.reader, precision=model.precision, batch_size=model.batch_size,
    )  # fmt: skip
    lock, run = FOLDER.open(folder, settings), Run(combinations, model, folder, progress)
    try:
        for data in combinations.data:
            run.results.notes.extend(_shortages(combinations, data))
            for name, method in combinations.methods.items():
                score_data(run, data, name, method)
        for captions_name, captions in combinations.captions.items():
            for name, method in combinations.methods.items():
                score_captions(run, captions_name, captions, name, method)
    except Stopped:
        return run.results._replace(stopped=True)
    finally:
        lock.release()
    return run.results


def _shortages(combinations: Combinations, data: Dataset) -> Iterator[str]:
    """The sentence about classes with too few images for the shots, if a head reads them."""
    shots = max(combinations.shots, default=0)
    if shots and "train" in data.splits and any(HEADS[head].few_shot for head in combinations.heads):
        note = shortage_note(data.splits["train"].labels[:: data.views], len(data.classes), shots)
        if note is not None:
            yield f"{data.name}: {note}"
