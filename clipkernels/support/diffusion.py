"""SuS-SD: a support set of images that Stable Diffusion generates from the sentences of each class.

    image i of a class: its sentence i mod m, from noise seeded by (seed, class, i, attempt)

Each image carries its recipe, so that a run that was stopped goes on, and never with another one.
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
from clipkernels.files import replacing
from clipkernels.identity import fingerprint
from clipkernels.support.features import Progress, Report, encode, encoder_of
from clipkernels.support.folders import folder_names, images_in, refuse_others
from clipkernels.support.manifest import classes_before
from clipkernels.support.prompts import Prompts, check_prompts, listed
from clipkernels.support.store import FEATURES, SupportSet, assemble, refuse_empty

RECIPE = "clipkernels"
"""The PNG text that holds how an image was made."""


def load_pipeline(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """diffusers' StableDiffusionPipeline of a folder, or of a model id, which it downloads; half precision on a GPU.

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
    """The set of images generated from each class's sentences, in turn; saved in a folder, where each image is as soon
    as it is made: a run that was stopped goes on, and leaves the same images on the same machine.

    A later call with a larger `per_class` keeps the images and features that are there, bit for bit; the features of
    the new ones are, to rounding, those of a set generated at once.

    What the pipeline's safety checker flags, and blackens, is tried again from other noise; a place where all of it is
    flagged stays empty, which every run reports.

    Args:
        model: what `ck.encode_image` takes.
        preprocess: what makes a tensor (3,S,S) of a PIL image.
        prompts: the sentences of each class; its order is that of the labels.
        pipeline: diffusers' StableDiffusionPipeline or what is called like it, or what `load_pipeline` takes.
        folder: new, empty, or a support set of this kind.
        per_class: images per class.
        guidance: the scale of classifier-free guidance.
        steps: of denoising.
        seed: of the noise.
        retries: how often a flagged image is tried again.
        images_per_call: with more than one, images may differ by rounding where a run was stopped.
        name, pretrained: of the model, for the manifest.
        batch_size: images per forward of the model.
        progress: called with what is being done, how many are, and of how many.
        report: called with a line for each image that is left out.
    Raises:
        ValueError: images in the folder that are not of this set, were made in another way or are broken, classes
            without an image, which it names, a preprocessing that is left to chance, or numbers out of range.
        ImportError: diffusers is not installed.
        OSError: a file cannot be read or written.
    Source: SuS-X, arXiv 2211.16198, section 3.1 (SD), and the settings of its released code for Stable Diffusion v1-4.
    """
    prompts = check_prompts(prompts)
    counts = {"per_class": per_class, "steps": steps, "images_per_call": images_per_call}
    for what, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{what} must be a positive int, got {count!r}")
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries must be an int of at least 0, got {retries!r}")
    if isinstance(pipeline, (str, os.PathLike)):
        pipeline = load_pipeline(pipeline, next(model.parameters()).device)
    root, who = Path(folder), encoder_of(model, preprocess)
    classes_before(root, "SD")
    how = {"guidance": float(guidance), "steps": steps, "seed": seed, "pipeline": _identity(pipeline)}
    places = {
        label: [
            (root / at / f"{i:04}.png", {"prompt": said[i % len(said)], "index": i, **how}) for i in range(per_class)
        ]
        for (label, said), at in zip(prompts.items(), folder_names(list(prompts)), strict=True)
    }
    for recipes in places.values():
        at = recipes[0][0].parent
        refuse_others(at, sorted(set(images_in(at)) - {path.name for path, _ in recipes}))
        for path, recipe in recipes:
            _check_recipe(path, recipe)
    done, total = 0, per_class * len(prompts)
    for label, recipes in places.items():
        for start in range(0, per_class, images_per_call):
            group = recipes[start : start + images_per_call]
            _fill(pipeline, label, group, retries, report)
            done += len(group)
            if progress is not None:
                progress("generating", done, total)
    made = {label: [str(path) for path, _ in recipes if path.exists()] for label, recipes in places.items()}
    refuse_empty(made, "an image that is not flagged")
    flat = [path for paths in made.values() for path in paths]
    told: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report": report}
    encoding = encode(model, preprocess, who, flat, root / FEATURES, **told)
    broken = sorted(set(flat) - set(encoding.paths))
    if broken:
        raise ValueError(f"expected images with features, got {listed(broken)}: delete them, and they are made again")
    settings = {"source": getattr(pipeline, "name_or_path", None), "per_class": per_class, "retries": retries, **how}
    about = {"kind": "SD", "settings": settings, "model": name, "pretrained": pretrained}
    found = assemble(model, prompts, encoding, made, about)
    found.save(root)
    return found


def _fill(
    pipeline: Any, label: str, group: Sequence[tuple[Path, dict[str, Any]]], retries: int, report: Report
) -> None:
    """Makes the images of a group that are not there; what stays flagged leaves a note, and is not tried again."""
    missing = []
    for path, recipe in group:
        noted = None if path.exists() else _given_up(path, recipe)
        if noted is not None and retries <= noted:
            report(f"no image {recipe['index']} of {label!r}: flagged {noted + 1} times")
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
        missing = [place for place, flagged in zip(missing, flags, strict=True) if flagged]
    for path, recipe in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path.with_suffix(".flagged")) as temporary:
            Path(temporary).write_text(json.dumps({**recipe, "retries": retries}), encoding="utf-8")
        report(f"no image {recipe['index']} of {label!r}: flagged {retries + 1} times")


def _given_up(path: Path, recipe: Mapping[str, Any]) -> int | None:
    """How often a place that was left empty has been tried again by this recipe, None where it has not been left."""
    note = path.with_suffix(".flagged")
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        retries = int(noted.pop("retries"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return retries if noted == recipe else None


def _write_image(path: Path, image: Image.Image, recipe: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_text(RECIPE, json.dumps(recipe))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def _check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Raises ValueError where an image was made in another way than it would be now."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            came = json.loads(image.info[RECIPE])
    except OSError as error:
        if error.errno is not None:  # it is the disk's, not Pillow's
            raise
        raise ValueError(f"expected an image, got {path}, which is broken: delete it, and it is made again") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"expected an image that was generated here, got {path}: choose another folder") from error
    for what, value in recipe.items():
        if came.get(what) != value:
            raise ValueError(
                f"expected {path} to be made with {what} {value!r}, got {came.get(what)!r}: choose another folder"
            )


def _seed(seed: int, label: str, index: int, attempt: int) -> int:
    """A seed of 63 bits that depends on everything given."""
    digest = sha256(json.dumps([seed, label, index, attempt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _identity(pipeline: Any) -> str:
    """What distinguishes a pipeline from others: its type, its weights, in their precision, and its scheduler."""
    kind = pipeline if hasattr(pipeline, "__qualname__") else type(pipeline)  # a function, or what has a class
    parts: dict[str, Any] = {"": f"{kind.__module__}.{kind.__qualname__}"}
    for part, module in getattr(pipeline, "components", {}).items():
        if isinstance(module, nn.Module) and part != "safety_checker":
            parts[part] = next(iter(fingerprint(module).items()))
        elif part == "scheduler":
            config = {key: value for key, value in module.config.items() if not key.startswith("_")}
            parts[part] = [type(module).__name__, config]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
