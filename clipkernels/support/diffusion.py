"""SuS-SD: a support set of images that Stable Diffusion generates from the sentences of each class.

    image i of a class: its sentence i mod m, from noise seeded by (seed, class, i, attempt)

Each image file holds its recipe, so an interrupted run resumes, and never with other settings.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from clipkernels.data import Preprocess
from clipkernels.files import atomic_write, open_regular
from clipkernels.fingerprint import fingerprint
from clipkernels.formats import parse_object
from clipkernels.images import Reader
from clipkernels.messages import list_names
from clipkernels.support.features import Progress, Report, encode, encoder_of
from clipkernels.support.folders import folder_names, images_in, refuse_foreign_images
from clipkernels.support.manifest import previous_classes
from clipkernels.support.prompts import Prompts, check_prompts
from clipkernels.support.store import FEATURES, SupportSet, assemble, refuse_empty

RECIPE = "clipkernels"
MAX_NOTE_BYTES = 1 << 20
"""Key of the PNG text chunk that holds an image's recipe."""


def load_pipeline(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """diffusers' StableDiffusionPipeline from a folder or a model id; a model id is downloaded. fp16 on a GPU.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "generation needs diffusers, which is not installed: pip install clipkernels[diffusion]"
        ) from error
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    local = Path(source).is_dir()
    pipeline = StableDiffusionPipeline.from_pretrained(os.fspath(source), use_safetensors=True, local_files_only=local)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def generate(
    model: nn.Module,
    preprocess: Preprocess,
    prompts: Prompts,
    pipeline: Any,
    folder: str | os.PathLike[str],
    *,
    per_class: int = 100,
    guidance: float = 9.5,
    steps: int = 85,
    seed: int = 0,
    retries: int = 3,
    images_per_call: int = 1,
    name: str | None = None,
    pretrained: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    report: Report = warnings.warn,
) -> SupportSet:
    """A support set of images generated from each class's sentences in turn, saved in a folder.

    Each image is written as soon as it is generated. An interrupted run resumes and ends with the same images on the
    same machine. A later call with a larger `per_class` keeps the existing images and features bit for bit; the
    features of the new images equal those of a set generated at once up to rounding.

    An image that the pipeline's safety checker flags, and blackens, is generated again from other noise. If all
    attempts are flagged, the image is left out, and every run reports it.

    Args:
        model: a model that `ck.encode_image` takes.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        prompts: the sentences of each class; its order is the order of the labels.
        pipeline: diffusers' StableDiffusionPipeline, a callable with its interface, or an argument of `load_pipeline`.
        folder: a new or empty folder, or a support set of this kind.
        per_class: images per class.
        guidance: scale of classifier-free guidance.
        steps: denoising steps.
        seed: seed of the noise.
        retries: further attempts for a flagged image.
        images_per_call: images per call of the pipeline. With more than one, the images of an interrupted run may
            differ by rounding.
        name, pretrained: name and weights of the model, for the manifest.
        batch_size: images per forward of the model.
        progress: called with the stage, the number of finished items and the number of all items.
        report: called with a line for each image that is left out.
    Raises:
        ValueError: images in the folder that do not belong to this set, have another recipe or are broken, classes
            without an image (the message names them), a random preprocessing, or numbers out of range.
        ImportError: diffusers is not installed.
        OSError: a file cannot be read or written.
    Source: SuS-X, arXiv 2211.16198, section 3.1 (SD), and the settings of its released code for Stable Diffusion v1-4.
    """
    prompts = check_prompts(prompts)
    counts = {"per_class": per_class, "steps": steps, "images_per_call": images_per_call}
    for option, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{option} must be a positive int, got {count!r}")
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be an int ≥ 0, got {retries!r}")
    if isinstance(pipeline, (str, os.PathLike)):
        pipeline = load_pipeline(pipeline, next(model.parameters()).device)
    root, encoder = Path(folder), encoder_of(model, preprocess, Reader())
    previous_classes(root, "SD")
    settings = {"guidance": float(guidance), "steps": steps, "seed": seed, "pipeline": _pipeline_hash(pipeline)}
    recipes = {
        label: [
            (root / folder_name / f"{i:04}.png", {"prompt": sentences[i % len(sentences)], "index": i, **settings})
            for i in range(per_class)
        ]
        for (label, sentences), folder_name in zip(prompts.items(), folder_names(list(prompts)), strict=True)
    }
    for of_class in recipes.values():
        parent = of_class[0][0].parent
        refuse_foreign_images(parent, sorted(set(images_in(parent)) - {path.name for path, _ in of_class}))
        for path, recipe in of_class:
            _check_recipe(path, recipe)
    done, total = 0, per_class * len(prompts)
    for label, of_class in recipes.items():
        for start in range(0, per_class, images_per_call):
            group = of_class[start : start + images_per_call]
            _generate_missing(pipeline, label, group, retries, report)
            done += len(group)
            if progress is not None:
                progress("generating", done, total)
    paths = {label: [str(path) for path, _ in of_class if path.exists()] for label, of_class in recipes.items()}
    refuse_empty(paths, "an image that is not flagged")
    flat = [path for of_class in paths.values() for path in of_class]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report": report}
    encoding = encode(model, preprocess, encoder, flat, root / FEATURES, **options)
    broken = sorted(set(flat) - set(encoding.paths))
    if broken:
        raise ValueError(
            f"expected readable images, got {list_names(broken)}: delete them and run again to generate them anew"
        )
    source = getattr(pipeline, "name_or_path", None)
    settings = {"source": source, "per_class": per_class, "retries": retries, **settings}
    about = {"kind": "SD", "settings": settings, "model": name, "pretrained": pretrained}
    support_set = assemble(model, prompts, encoding, paths, about)
    support_set.save(root)
    return support_set


def _generate_missing(
    pipeline: Any, label: str, group: Sequence[tuple[Path, dict[str, Any]]], retries: int, report: Report
) -> None:
    """Generate the missing images of a group; an image that stays flagged leaves a note and is not tried again."""
    missing = []
    for path, recipe in group:
        used = None if path.exists() else _retries_used(path, recipe)
        if used is not None and retries <= used:
            report(f"skipped image {recipe['index']} of {label!r}: flagged {used + 1} times")
        elif not path.exists():
            missing.append((path, recipe))
    for attempt in range(retries + 1):
        if not missing:
            return
        noise = [
            torch.Generator("cpu").manual_seed(_seed(recipe["seed"], label, recipe["index"], attempt))
            for _, recipe in missing
        ]
        output = pipeline(
            prompt=[recipe["prompt"] for _, recipe in missing],
            guidance_scale=missing[0][1]["guidance"],
            num_inference_steps=missing[0][1]["steps"],
            generator=noise,
        )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(missing)
        for (path, recipe), image, flagged in zip(missing, output.images, flags, strict=True):
            if not flagged:
                _write_image(path, image, {**recipe, "attempt": attempt})
        missing = [item for item, flagged in zip(missing, flags, strict=True) if flagged]
    for path, recipe in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path.with_suffix(".flagged")) as temporary:
            Path(temporary).write_text(json.dumps({**recipe, "retries": retries}), encoding="utf-8")
        report(f"skipped image {recipe['index']} of {label!r}: flagged {retries + 1} times")


def _retries_used(path: Path, recipe: Mapping[str, Any]) -> int | None:
    """The number of retries after which this recipe was given up, None if it was not."""
    file = path.with_suffix(".flagged")
    try:
        with open_regular(file) as stream:
            note = parse_object(stream.read(MAX_NOTE_BYTES).decode())
        retries = int(note.pop("retries"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return retries if note == recipe else None


def _write_image(path: Path, image: Image.Image, recipe: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_text(RECIPE, json.dumps(recipe))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def _check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Raise ValueError if an image exists and has another recipe, or none."""
    if not path.exists():
        return
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            actual = parse_object(image.info[RECIPE])
    except OSError as error:
        if error.errno is not None:  # an error of the disk, not Pillow's
            raise
        raise ValueError(
            f"expected an image, got {path}, which is broken: delete it and run again to generate it anew"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"expected an image that was generated here, got {path}: choose another folder") from error
    for option, value in recipe.items():
        if actual.get(option) != value:
            raise ValueError(
                f"expected {path} to be made with {option} {value!r}, got {actual.get(option)!r}: choose another folder"
            )


def _seed(seed: int, label: str, index: int, attempt: int) -> int:
    """A seed of 63 bits that depends on all arguments."""
    digest = sha256(json.dumps([seed, label, index, attempt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _pipeline_hash(pipeline: Any) -> str:
    """A hash of a pipeline's type, its weights in their precision, and its scheduler."""
    kind = pipeline if hasattr(pipeline, "__qualname__") else type(pipeline)  # a function stands for itself
    parts: dict[str, Any] = {"": f"{kind.__module__}.{kind.__qualname__}"}
    for part, module in getattr(pipeline, "components", {}).items():
        if isinstance(module, nn.Module) and part != "safety_checker":
            parts[part] = next(iter(fingerprint(module).items()))
        elif part == "scheduler":
            config = {key: value for key, value in module.config.items() if not key.startswith("_")}
            parts[part] = [type(module).__name__, config]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
