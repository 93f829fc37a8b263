"""`ck.export`: a model with its method to a folder that a runtime without torch serves, proved before it appears."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.logits import logits_of
from clipkernels.arguments import check_callable, check_choice, check_model, check_path, check_range
from clipkernels.artefacts.folders import check_replaceable, replaced_folder
from clipkernels.artefacts.libraries import library_of
from clipkernels.artefacts.weights import unwrapped
from clipkernels.classifier import eval_mode
from clipkernels.exporting import immich
from clipkernels.exporting.files import installed_versions, sizes_in, write_guide, write_requirements
from clipkernels.exporting.graphs import RUNTIMES, check_slow, count_slow, graphs_of
from clipkernels.exporting.header import EXPORTS, check_config, write_header
from clipkernels.exporting.images import Images, as_images, callable_preprocess, input_shape, noise, own_preprocess
from clipkernels.exporting.memory import peak_memory
from clipkernels.exporting.parity import BATCHES, Parity
from clipkernels.exporting.precision import PRECISIONS, check_precision, write_image, write_text
from clipkernels.exporting.preprocess_steps import preprocess_record
from clipkernels.exporting.report import Products, Report
from clipkernels.exporting.towers import Tower, check_cosine, make_towers, prove_folder, prove_graph, record_tower
from clipkernels.fingerprint import fingerprint
from clipkernels.layered_class import unserved
from clipkernels.method_names import short_name
from clipkernels.methods import Dense, Method
from clipkernels.patching import method_of
from clipkernels.plan_records import record_plan
from clipkernels.runtime.copying import copy_into
from clipkernels.runtime.engines import HINTS
from clipkernels.tower import make_plan


class Settings(NamedTuple):
    """Of an export: runtime, precision, layout, and the least first percentile of the cosine; as in `export`."""

    to: str
    precision: str
    layout: str | None
    min_cosine: float | None


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    to: str = "onnx",
    precision: str = "fp32",
    tokenizer: Any = None,
    preprocess: Any = None,
    calibrate: Images | None = None,
    min_cosine: float | None = None,
    config: str | Mapping[str, Any] | None = None,
    layout: str | None = None,
    check: Images | None = None,
    progress: Callable[[str], object] | None = None,
) -> Report:
    """Write a model with the method that it is patched with to a folder that runs without torch and clipkernels.

    The folder has the image tower and the text tower, both with a free batch size and embeddings that are not
    normalised; preprocessing and tokenizer as data; export.json with method, plan, fingerprints, versions, the SHA-256
    of every file and the report; and a copy of `clipkernels.runtime`, so that `from runtime import Runtime` works
    there. It is written under another name, read again and compared with PyTorch in batches of 1, 3 and 8. Then it
    takes its place, so that it is there whole or not at all. A folder that `ck.export` wrote is replaced.

    Args:
        model: a model of open_clip, transformers, timm or OpenAI's clip, patched or not. It is exported in float32,
            from a copy if it is in another precision or on another device than the CPU.
        folder: a new or empty folder, or an exported one. Folders above it are made.
        to: "onnx" for onnxruntime, "openvino", or "pt2" for programs of torch.export.
        precision: "fp32"; "bf16" for OpenVINO and torch; or "int8", in which the products with a weight are INT8, and
            attention and the choice of tokens stay float. The text tower then has weights in INT8 alone.
        tokenizer: the model's tokenizer, or None for a folder whose text tower takes ids.
        preprocess: the model's preprocessing, or transformers' image processor. None takes the one that a model of
            timm or OpenAI's clip, or one that open_clip made, carries.
        calibrate: images for the scales of INT8: preprocessed (n,3,S,S), or files and folders, of which at most 300
            are drawn.
        min_cosine: least first percentile, over the images of the comparison, of the cosine with float32. OpenVINO's
            INT8 puts the products that cost most back to float until it is kept; otherwise less is an error.
        config: a name of the model, or its configuration, for export.json; the images' and texts' sizes are the
            model's own.
        layout: "immich" for the files that immich reads, with normalised embeddings; to="onnx" alone.
        check: images of the comparison, as in `calibrate`. By default the calibration's, or 12 of noise.
        progress: called with the name of each step before it starts, such as "image graph".
    Returns:
        Report.
    Raises:
        ValueError: a folder that holds something else; a precision that the runtime does not have; preprocessing or
            tokenizer that cannot be written as data; weights that are on the meta device or give NaN; or embeddings
            that differ from PyTorch's.
        ImportError: a package of the runtime is not installed.
        UnsupportedTower: a model of another library.
        TypeError: the model is no torch module, the folder no path, or `progress` cannot be called.
        OSError: a file cannot be read or written.
        On any error the folder is as it was.
    """
    check_model(model)
    check_path(folder=folder)
    check_choice("to", to, *RUNTIMES)
    check_choice("precision", precision, *PRECISIONS)
    check_choice("layout", layout, None, "immich")
    check_precision(to, precision, calibrate, layout)
    if min_cosine is not None:
        check_range("min_cosine", min_cosine, 0, 1)
    check_config(config)
    check_callable(progress=progress)
    tell = progress or (lambda step: None)
    target = Path(os.path.abspath(folder))
    check_replaceable(target, EXPORTS)
    model = unwrapped(model)
    library = library_of(model)
    preprocess = own_preprocess(model, library) if preprocess is None else preprocess
    steps = preprocess_record(preprocess)
    run_preprocess = callable_preprocess(preprocess)
    model = _in_float32(model)
    shape = input_shape(model, run_preprocess)
    calibration = None if calibrate is None else as_images("calibrate", calibrate, run_preprocess, shape)
    default = noise(sum(BATCHES), shape) if calibration is None else calibration
    images = default if check is None else as_images("check", check, run_preprocess, shape)
    settings = Settings(to, precision, layout, min_cosine)
    name = {"library": library, "model": type(model).__name__, "config": config}
    method, plan = _method_and_plan(model)
    logits = logits_of(model)
    with eval_mode(model), unserved(model), replaced_folder(target, EXPORTS) as temporary:
        tell("embeddings of PyTorch")
        towers, tokens = make_towers(model, images, tokenizer, temporary, graphs_of(to).SUFFIX, layout)
        products, seconds = _write_graphs(towers, temporary, settings, calibration, tell)
        tell("comparison with PyTorch")
        parities, nodes = _prove_graphs(towers, temporary, settings, method)
        records = {kind: record_tower(tower) for kind, tower in towers.items()}
        if layout:
            length = records["text"]["context_length"] if "text" in records else None
            tokens = immich.write(temporary, steps, tokens, length, records["image"]["width"])
        else:
            copy_into(temporary)
            write_requirements(temporary, to, tokens)
            write_guide(temporary, name, None if method is None else short_name(method), to, precision)
        file, batch = temporary / towers["image"].file, (BATCHES[-1], *shape)
        report = Report(
            str(target), to, precision, parities["image"], parities.get("text"), products, nodes, sizes_in(temporary),
            seconds, peak_memory(to, file, HINTS[precision], batch),
        )  # fmt: skip
        header = {
            "runtime": to, "precision": precision, "layout": layout, "image": records["image"],
            "text": records.get("text"), "preprocess": steps, "tokenizer": tokens,
            "logit_scale": None if logits is None else logits.scale,
            "logit_bias": None if logits is None else logits.bias,
            "name": name, "method": None if method is None else str(method), "plan": plan,
            "tower": fingerprint(model), "text_tower": fingerprint(model, "text") if "text" in towers else None,
            "report": report.record(), "versions": installed_versions(),
        }  # fmt: skip
        write_header(temporary, header)
        prove_folder(temporary, towers, run_preprocess, has_tokenizer=tokens is not None)
    return report


def _write_graphs(
    towers: Mapping[str, Tower],
    folder: Path,
    settings: Settings,
    calibration: Tensor | None,
    tell: Callable[[str], object],
) -> tuple[Products | None, dict[str, float]]:
    """Write the graphs of the towers; return the products of the image tower in INT8, and the seconds of each graph."""
    products, seconds = None, {}
    for kind, tower in towers.items():
        tell(f"{kind} graph")
        start = time.perf_counter()
        file = folder / tower.file
        file.parent.mkdir(exist_ok=True)
        to, precision = settings.to, settings.precision
        if kind == "image":
            comparison = (calibration, settings.min_cosine, tower.inputs, tower.expected)
            products = write_image(tower.module, file, to, precision, tower.names, *comparison)
        else:
            write_text(tower.module, file, to, precision, tower.names, tower.inputs)
        seconds[kind] = time.perf_counter() - start
    return products, seconds


def _prove_graphs(
    towers: Mapping[str, Tower], folder: Path, settings: Settings, method: Method | None
) -> tuple[dict[str, Parity], dict[str, int]]:
    """The parity of each graph, and the numbers of nodes of the image tower's.

    Raises:
        ValueError: a graph with slow nodes, or with other embeddings than PyTorch's.
    """
    nodes = count_slow(graphs_of(settings.to).operators(folder / towers["image"].file))
    if method is not None:
        check_slow(nodes, str(method))
    reduced = method is not None and not isinstance(method, Dense)
    parities = {
        kind: prove_graph(tower, folder, settings.to, settings.precision, reduced and kind == "image")
        for kind, tower in towers.items()
    }
    check_cosine(parities["image"], settings.min_cosine)
    return parities, nodes


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy of it on the CPU in float32 if it is elsewhere or in another precision.

    Raises:
        ValueError: it has no weights yet.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(x.is_meta for x in tensors):
        raise ValueError("expected a model with weights, got one on the meta device: load its weights first")
    if all(x.device.type == "cpu" and (not x.is_floating_point() or x.dtype == torch.float32) for x in tensors):
        return model
    return copy.deepcopy(model).float().cpu()


def _method_and_plan(model: nn.Module) -> tuple[Method | None, Any]:
    """The method that a model is patched with and its plan for JSON, or None twice."""
    try:
        tower, method = adapters.find_tower(model), method_of(model)
    except UnsupportedTower:  # such as a ResNet
        return None, None
    plan = None if method is None else record_plan(make_plan(method, tower, tower.num_tokens))
    return method, msgspec.to_builtins(plan)
