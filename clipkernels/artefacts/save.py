"""`ck.save`: a model with its method to a folder, which is proved by loading it before it appears."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.arguments import check_model, check_path, describe
from clipkernels.artefacts.contents import has_text
from clipkernels.artefacts.folders import check_replaceable, replaced_folder
from clipkernels.artefacts.header import Header, write_header
from clipkernels.artefacts.libraries import checkpoints_of, library_of
from clipkernels.artefacts.method_records import record_method, save_modules
from clipkernels.artefacts.open_clip import has_fp32_norms
from clipkernels.artefacts.proof import prove
from clipkernels.artefacts.weights import plain_state, precisions_of, unwrapped
from clipkernels.files import hash_of
from clipkernels.fingerprint import fingerprint
from clipkernels.measure.environment import versions
from clipkernels.measure.fidelity import Fidelity
from clipkernels.patching import method_of
from clipkernels.plan_records import record_plan
from clipkernels.tower import make_plan


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    config: str | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    preprocess: Any = None,
    fidelity: Mapping[str, Any] | Fidelity | None = None,
) -> None:
    """Write a model with the method that it is patched with to a folder, which `ck.load` reads.

    Without clipkernels the folder is a dense checkpoint of the model's library. (timm loads it with `pretrained=True`;
    without that the weights are random, and nothing says so.) `clipkernels.json` beside the weights
    has method, plan, fingerprints, versions and the report. Predictor and learnt tokens have files of their own.
    Nothing is pickled.

    The folder is written under another name, loaded, and compared with the model: every weight and the embeddings of
    images and texts of noise, bit for bit. Then it takes its place, so that it is there whole or not at all. An
    artefact that is there is replaced; between two renames the name is free for a moment. A killed process leaves a
    hidden folder beside it, which the next save to the same place removes.

    Args:
        model: a model of open_clip, transformers, timm or OpenAI's clip, on one device, patched or not. Wrappers of
            torch.compile and data parallelism around the whole model are left out.
        folder: a new or empty folder, or an artefact. Folders above it are made.
        config: open_clip: its name of the model, or the configuration as a dict; None for the bundled model. timm:
            arguments of `create_model` that the model does not carry. Otherwise None.
        tokenizer: the model's tokenizer, which is saved or compared with the folder's. None is the library's default
            for open_clip and OpenAI's clip, and no tokenizer for transformers, whose processors hold one.
        preprocess: the model's preprocessing. transformers: its image processor, or None for none. Other libraries:
            its configuration as a dict, in place of the model's own, or a function from a PIL image to a tensor, which
            is compared with the folder's.
        fidelity: a report of what the method changes, which JSON can hold, such as of `clipkernels bench`.
    Raises:
        ValueError: a folder that holds something else; a method that is not built in; adapters that are not merged,
            quantised or sharded weights; no configuration or tokenizer where one is needed; or a folder that would
            give another model, because the configuration is not the model's.
        UnsupportedTower: a model of another library.
        TypeError: the model is not a torch module, or the folder no path.
        OSError: a file cannot be written.
        On any error the folder is as it was.
    """
    check_model(model)
    check_path(folder=folder)
    report = _report(fidelity)
    if config is not None and not isinstance(config, str | Mapping):
        raise TypeError(f"config must be a name, a dict or None, got {describe(config)}")
    if tokenizer is not None and not callable(tokenizer) and not hasattr(tokenizer, "image_processor"):
        raise TypeError(f"tokenizer must be callable, or a processor of transformers, got {describe(tokenizer)}")
    if preprocess is not None and not callable(preprocess) and not isinstance(preprocess, Mapping):
        raise TypeError(f"preprocess must be callable, a dict or None, got {describe(preprocess)}")
    target = Path(os.path.abspath(folder))
    check_replaceable(target)
    model = unwrapped(model)
    library = library_of(model)
    checkpoints = checkpoints_of(library)
    state = plain_state(model)
    method, plan = _method_and_plan(model)
    record = None if method is None else record_method(method)
    with replaced_folder(target) as temporary:
        kept = checkpoints.write(model, state, temporary, config, tokenizer, preprocess)
        del state
        if method is not None:
            save_modules(method, temporary)
        precision, precisions = precisions_of(model)
        files = {file.name: hash_of(file) for file in sorted(temporary.iterdir()) if file.is_file()}
        header = Header(
            library=library, model=type(model).__name__, method=record, plan=plan, tower=fingerprint(model),
            text_tower=fingerprint(model, "text") if has_text(model) else None, precision=precision,
            precisions=precisions, fp32_norms=library == "open_clip" and has_fp32_norms(model), tokenizer=kept,
            files=files, fidelity=report,
            versions={name: version and str(version) for name, version in versions().items()},
        )  # fmt: skip
        write_header(temporary, header)
        prove(model, temporary, tokenizer, preprocess)


def _method_and_plan(model: nn.Module) -> tuple[Any, Any]:
    """The method that a model is patched with and the record of its plan, or None twice."""
    try:
        tower, method = adapters.find_tower(model), method_of(model)
    except UnsupportedTower:  # such as a ResNet
        return None, None
    return (None, None) if method is None else (method, record_plan(make_plan(method, tower, tower.num_tokens)))


def _report(fidelity: Any) -> dict[str, Any] | None:
    """A report as a dict, or None; raise TypeError for something else."""
    if isinstance(fidelity, Fidelity):
        fidelity = fidelity._asdict()
    if fidelity is not None and not isinstance(fidelity, Mapping):
        raise TypeError(f"fidelity must be a mapping or None, got {describe(fidelity)}")
    return None if fidelity is None else dict(fidelity)
