"""Model, classes, method and head in one object: preprocessed images in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.heads import Head, ZeroShot
from clipkernels.methods import Method
from clipkernels.patch import check_images, encode_image, patch

PROMPTS_PER_BATCH = 256


class Classifier:
    """A CLIP model that names which of K classes an image shows.

    The class embeddings are encoded once, at construction. Nothing is changed until everything has been checked, and
    then only by `method`, patched into the model in place as `ck.patch` does it.

    Args:
        model: any model with `visual`, `encode_image` and `encode_text` (open_clip's CLIP, CustomTextCLIP, CoCa).
        tokenizer: a list of n texts to token ids (n,T).
        classes: K different names.
        templates: prompts with `{}` where the name goes; a class is the mean over all of them.
        method: what the tower does with its tokens; None leaves the model as it is, patched or not.
        head: a finished head, or a callable that makes one of the class embeddings (K,E), such as a head's class or a
            partial of it. What has an attribute `needs` and is no class counts as finished: it brings its own class
            embeddings, and the classes give only its names.
    Raises:
        ValueError: no classes, an empty or repeated name, a string in place of a list, a template without `{}`, a
            model that is no CLIP.
        UnsupportedTower: a method for a tower that cannot be served.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        method: Method | None = None,
        head: Head | Callable[[Tensor], Head] = ZeroShot,
    ) -> None:
        self.classes = _check_classes(classes)
        templates = _check_templates(templates)
        missing = [name for name in ("visual", "encode_image", "encode_text") if not hasattr(model, name)]
        if missing:
            raise ValueError(f"model must be a CLIP, got {type(model).__name__} without {', '.join(missing)}")
        if hasattr(head, "needs") and not isinstance(head, type):
            self.head = cast(Head, head)
        else:
            make = cast(Callable[[Tensor], Head], head)
            self.head = make(class_embeddings(model, tokenizer, self.classes, templates))
        self.model: Any = model if method is None else patch(model, method)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B,K) of preprocessed images (B,3,S,S), on the model's device and in its dtype.

        Training mode and gradients are the caller's: use `torch.inference_mode()` where none are needed.

        Raises:
            ValueError: images of another size than the tower takes.
        """
        if self.head.needs:
            extras: dict[str, Any] = dict.fromkeys(self.head.needs, True)
            return self.head(encode_image(self.model, images, anchors=getattr(self.head, "anchors", None), **extras))
        size = getattr(self.model.visual, "image_size", None)
        if size is not None and not hasattr(self.model.visual, "trunk"):  # timm's towers say themselves what they take
            check_images(images, (size, size) if isinstance(size, int) else size)
        return self.head(self.model.encode_image(images))

    def reset(self) -> None:
        """Lets a head that adapts forget what it has seen; nothing happens with another."""
        if hasattr(self.head, "reset"):
            self.head.reset()


@torch.no_grad()
def class_embeddings(
    model: Any, tokenizer: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Class embeddings (K,E) fp32, L2-normalised means of the normalised embeddings of a class's prompts.

    The model encodes in eval mode, on the device of its parameters; its mode is restored.
    Source: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        text = torch.cat(
            [
                normalize(model.encode_text(tokenizer(prompts[start : start + PROMPTS_PER_BATCH]).to(device)).float())
                for start in range(0, len(prompts), PROMPTS_PER_BATCH)
            ]
        )
    finally:
        for module, mode in training.items():
            module.training = mode
    return normalize(text.unflatten(0, (len(classes), len(templates))).mean(1))


def _check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        raise ValueError(f"classes must be a list of names, got the string {classes!r}")
    classes = tuple(classes)
    if not classes:
        raise ValueError("classes must name at least one class, got none")
    for name in classes:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classes must be non-empty strings, got {name!r}")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes must differ, got {twice!r} {classes.count(twice)} times")
    return classes


def _check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        raise ValueError(f"templates must be a list of prompts, got the string {templates!r}")
    templates = tuple(templates)
    if not templates:
        raise ValueError("templates must hold at least one prompt, got none")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"templates must hold {{}} where the class name goes, got {template!r}")
    return templates
