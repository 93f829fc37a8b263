"""Images for calibration and comparison, and the preprocessing that a library gives its models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.arguments import check_path, describe
from clipkernels.encode import check_images, check_images_list
from clipkernels.images.batches import Pictures, collate, image_shape
from clipkernels.images.walker import draw_images, find_images
from clipkernels.messages import first_line, quantity, skip_message

Images = Tensor | Sequence[Any] | str | os.PathLike[str]
"""Preprocessed images (n,3,S,S), a sequence of (3,S,S), or files and folders."""
LIMIT = 300
"""Files that are used at most, drawn at random; quantisation needs no more."""


def as_images(name: str, images: Images, preprocess: Callable[[Image.Image], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Images (n,3,S,S) float32 on the CPU, of tensors or of files.

    Raises:
        ValueError: no images, images of another size, or files none of which is an image.
        TypeError: no images at all.
        OSError: a folder cannot be read.
    Warns:
        UserWarning: a file that is no image, which is left out.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    if isinstance(images, Sequence) and len(images) and isinstance(images[0], str | os.PathLike):
        for path in images:
            check_path(**{name: path})
        paths = draw_images(find_images([os.fspath(path) for path in images]).paths, LIMIT, 0)
        pictures = Pictures(paths, preprocess, shape)
        loaded = collate([pictures[index] for index in range(len(paths))])
        if loaded.images is None:
            reason = loaded.failed[0][1] if loaded.failed else "there are no files"
            raise ValueError(f"{name} must be images, got {quantity(len(paths), 'file')} without one: {reason}")
        for index, reason in loaded.failed:
            warnings.warn(f"{name}: {skip_message(paths[index], reason)}", stacklevel=3)
        return loaded.images.float()
    try:
        check_images_list(images)
        tensor = images if isinstance(images, Tensor) else torch.stack([torch.as_tensor(image) for image in images])
        check_images(tensor, (shape[1], shape[2]))
        if not tensor.isfinite().all():
            raise ValueError("images must be finite, got NaN or infinity")
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: sizes that differ
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {first_line(error)}") from error
    return tensor.detach().float().cpu()


def noise(count: int, shape: tuple[int, ...]) -> Tensor:
    """Images (count,3,S,S) of noise, always the same."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def own_preprocess(model: Any, library: str) -> Any:
    """The preprocessing for evaluation that a model carries.

    Raises:
        ValueError: it carries none.
    """
    if library == "timm":
        import timm

        return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    if library == "openai":
        from clip.clip import _transform

        return _transform(model.visual.input_resolution)
    config = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if library == "open_clip" and config is not None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**config), is_train=False)
    raise ValueError(f"expected preprocess=, because this model of {library} carries none, got None")


def callable_preprocess(preprocess: Any) -> Callable[[Image.Image], Tensor]:
    """The function from a PIL image to a tensor (3,S,S) of a preprocessing, or of transformers' image processor.

    Raises:
        TypeError: it cannot be called.
    """
    from clipkernels.artefacts.transformers import run_processor

    processor = getattr(preprocess, "image_processor", preprocess)
    if hasattr(processor, "image_mean"):
        return lambda image: torch.as_tensor(run_processor(processor, image))
    if not callable(preprocess):
        raise TypeError(
            f"preprocess must be callable, or an image processor of transformers, got {describe(preprocess)}"
        )
    function: Callable[[Image.Image], Tensor] = preprocess
    return function


def input_shape(model: nn.Module, preprocess: Callable[[Image.Image], Tensor]) -> tuple[int, ...]:
    """The shape (3,S,S) of the images that a model takes, after checking that its preprocessing gives it.

    Raises:
        ValueError: the preprocessing fails, or gives another shape.
    """
    shape = image_shape(model, preprocess)
    try:
        actual = tuple(preprocess(Image.new("RGB", (320, 240))).shape)
    except Exception as error:  # a function of the caller
        raise ValueError(f"expected a preprocessing of a PIL image, got one that fails: {first_line(error)}") from error
    if actual != shape:
        raise ValueError(f"expected a preprocessing that gives the tower's {shape}, got one that gives {actual}")
    return shape
