"""Model, classes, method and head in one object: preprocessed images in, logits out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.logits import logits_of
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import Tokenizer, find_cut, ids_of
from clipkernels.arguments import check_mapping, check_model, check_tensors, describe, is_list, shape_of
from clipkernels.encode import check_images, encode_image
from clipkernels.heads import Head, ZeroShot
from clipkernels.messages import list_names
from clipkernels.methods import Method
from clipkernels.patching import check_method, method_of, patch

PROMPTS_PER_BATCH = 256


class Classifier:
    """A CLIP model that classifies images into K classes.

    The class embeddings are encoded, and the scale and the bias of the model's logits read, once, at construction. The
    model is changed only by `method`, which is patched in place as `ck.patch` does it, after all arguments have been
    checked. A warning names classes with a prompt whose end the tokenizer drops because the prompt is too long.

    Args:
        model: a model with an image and a text tower: open_clip's CLIP, CustomTextCLIP and CoCa, transformers' CLIP and
            SigLIP families, OpenAI's CLIP, or another model with `visual`, `encode_image` and `encode_text`.
        tokenizer: a function from a list of n texts to token ids (n,T), or a tokenizer or a processor of transformers,
            which then pads texts to the full length of the text tower.
        classes: K different names.
        templates: prompts with `{}` in place of the name, or a mapping from each class to its own prompts, as
            `clipkernels.support` makes them; a class embedding is the mean over all prompts of the class.
        method: the method that reduces the tower's tokens; None leaves the model as it is, patched or not.
        head: a finished head, or a callable that makes a head from the class embeddings (K,E), such as a head's class
            or a partial of it. An object with an attribute `needs` that is not a class counts as a finished head: it
            has its own class embeddings, and `classes` only names them. `ck.ZeroShot` itself, the default, takes the
            scale and the bias of the model's logits, if the model has them; every other head its own scale, unless
            that is "model".
    Raises:
        ValueError: no classes, an empty or repeated name, a string in place of a list, a template without `{}`, a
            class without prompts, a model that is not a CLIP, a scale or bias of the model that is not one finite
            number, or a head with scale="model" for a model without a scale.
        UnsupportedTower: a method is given and the tower is not supported, or a tower of transformers is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        classes: Sequence[str],
        templates: Sequence[str] | Mapping[str, Sequence[str]] = ("a photo of a {}.",),
        method: Method | None = None,
        head: Head | Callable[[Tensor], Head] = ZeroShot,
    ) -> None:
        self.classes = check_classes(classes)
        if not callable(head):
            raise TypeError(f"head must be a head, or a callable that makes one, got {describe(head)}")
        if method is not None:
            check_method(method)
        prompts = prompts_of(self.classes, templates)
        check_clip(model)
        model_logits = logits_of(model)
        if hasattr(head, "needs") and not isinstance(head, type):
            self.head = cast(Head, head)
        else:
            make = cast(Callable[[Tensor], Head], head)
            if head is ZeroShot and model_logits is not None:
                make = partial(ZeroShot, scale="model")
            # Learnt tokens may be coupled to tokens in the text tower, which change the class embeddings.
            learnt_tokens = getattr(method or _method_of(model), "tokens", None)
            embed = getattr(learnt_tokens, "class_embeddings", class_embeddings)
            self.head = make(embed(model, tokenizer, prompts))
            if not callable(self.head) or not hasattr(self.head, "needs"):
                raise TypeError(f"head must make a head with an attribute needs, got {describe(self.head)}")
        zero_shot = self._zero_shot
        takes_model = zero_shot is not None and zero_shot.takes_model
        if takes_model and model_logits is None:
            raise ValueError(f'expected a model with logit_scale for scale="model", got {type(model).__name__}')
        self.model: Any = model if method is None else patch(model, method)
        if zero_shot is not None and takes_model and model_logits is not None:
            zero_shot.set_logits(*model_logits)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B,K) of preprocessed images (B,3,S,S) on the model's device and in its dtype.

        Training mode and gradients stay as the caller set them: use `torch.inference_mode()` if no gradient is needed.

        Raises:
            TypeError: the images are no tensor.
            ValueError: the images do not have the tower's size.
        """
        check_tensors(images=images)
        if self.head.needs:
            extras: dict[str, Any] = dict.fromkeys(self.head.needs, True)
            return self.head(encode_image(self.model, images, anchors=getattr(self.head, "anchors", None), **extras))
        if not hasattr(self.model, "encode_image"):  # transformers
            tower = adapters.find_tower(self.model)
            check_images(images, tower.image_size)
            return self.head(tower.encode(images))
        size = _fixed_image_size(self.model.visual)
        if size is not None:
            check_images(images, size)
        return self.head(self.model.encode_image(images))

    @property
    def sigmoid(self) -> bool:
        """True if the head's logits have a bias, as SigLIP's: `probabilities` are then sigmoids."""
        return self._zero_shot is not None and self._zero_shot.bias is not None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (B,K) of logits (B,K): their softmax, or their sigmoids if the logits have a bias.

        Sigmoids are the probabilities that an image matches each class by itself. They need not sum to one.
        """
        check_tensors(logits=logits)
        if logits.ndim != 2:
            raise ValueError(f"logits must be (B,K), got {shape_of(logits)}")
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)

    @property
    def _zero_shot(self) -> ZeroShot | None:
        """The part of the head that computes the cosine term, or None if that is not a `ck.ZeroShot`."""
        part = getattr(self.head, "zero_shot", self.head)
        return part if isinstance(part, ZeroShot) else None

    def __repr__(self) -> str:
        method, classes = _method_of(self.model), len(self.classes)
        return f"Classifier({type(self.model).__name__}, classes={classes}, method={method}, head={self.head})"

    def reset(self) -> None:
        """Clear the state of a head that adapts; do nothing for any other head."""
        if hasattr(self.head, "reset"):
            self.head.reset()


def _fixed_image_size(visual: Any) -> tuple[int, int] | None:
    """Height and width of the images that an image tower takes, or None if it is unknown or not fixed."""
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    if hasattr(visual, "trunk") and not getattr(embed, "strict_img_size", False):
        return None
    size = getattr(visual, "image_size", None) if embed is None else embed.img_size
    return (size, size) if isinstance(size, int) else size


def _method_of(model: nn.Module) -> Method | None:
    """The method that a model is patched with; None for an unpatched or unsupported model."""
    try:
        return method_of(model)
    except UnsupportedTower:
        return None


def check_clip(model: Any) -> None:
    """Raise ValueError unless a model encodes images and texts.

    Raises:
        UnsupportedTower: a model of transformers whose image tower is not supported.
    """
    if all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text")):
        return
    if not all(hasattr(model, name) for name in ("get_image_features", "get_text_features")):
        expected = "model must be a CLIP with visual, encode_image and encode_text, or one of transformers with "
        raise ValueError(f"{expected}get_image_features and get_text_features, got {type(model).__name__}")
    adapters.find_tower(model)


def prompts_of(classes: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The prompts of each class.

    Raises:
        ValueError: a string in place of a list, no template, a template without `{}`, or a class without prompts.
    """
    if not isinstance(templates, Mapping):
        templates = check_templates(templates)
        return {name: [template.replace("{}", name) for template in templates] for name in classes}
    return check_prompt_lists({name: templates.get(name, ()) for name in classes}, "templates")


def check_prompt_lists(prompts: Any, name: str = "prompts", noun: str = "prompts") -> dict[str, list[str]]:
    """The prompts of each class, as lists; raise unless they are a mapping of lists that hold strings.

    Raises:
        TypeError: no mapping.
        ValueError: no class, or a class without a list of prompts.
    """
    check_mapping(**{name: prompts})
    if not prompts:
        raise ValueError(f"{name} must hold at least one class, got none")
    for key, group in prompts.items():
        if not is_list(group) or not group or not all(isinstance(prompt, str) for prompt in group):
            raise ValueError(f"{name} must hold a list of {noun} for {key!r}, got {describe(group)}")
    return {key: list(group) for key, group in prompts.items()}


def class_embeddings(model: Any, tokenizer: Tokenizer, prompts: Mapping[str, Sequence[str]]) -> Tensor:
    """Class embeddings (K,E) fp32: the L2-normalised mean of the normalised embeddings of each class's prompts.

    A warning names the classes that have a prompt whose end the tokenizer drops.

    Source: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    return torch.stack([normalize(rows.mean(0), dim=0) for rows in prompt_embeddings(model, tokenizer, prompts)])


@torch.no_grad()
def prompt_embeddings(model: Any, tokenizer: Tokenizer, prompts: Mapping[str, Sequence[str]]) -> list[Tensor]:
    """The L2-normalised embeddings (m,E) fp32 of the m prompts of each class.

    The model encodes in eval mode, on the device of its parameters. Its mode is restored afterwards. A warning names
    the classes that have a prompt whose end the tokenizer drops.

    Raises:
        UnsupportedTower: the model encodes no text.
        ValueError: the tokenizer does not return ids (n,T).
    """
    check_model(model)
    prompts = check_prompt_lists(prompts)
    sentences = [(name, sentence) for name, group in prompts.items() for sentence in group]
    device, encoder = next(model.parameters()).device, find_text_encoder(model)
    embeddings, cut = [], []
    with eval_mode(model):
        for start in range(0, len(sentences), PROMPTS_PER_BATCH):
            names, batch = map(list, zip(*sentences[start : start + PROMPTS_PER_BATCH], strict=True))
            ids = ids_of(tokenizer, batch, encoder.context)
            embeddings.append(normalize(encoder.encode(ids.to(device)).float()))
            cut += [names[row] for row in find_cut(tokenizer, batch, ids, encoder.context)]
    if cut:
        warnings.warn(
            f"the tokenizer cuts prompts of {list_names(list(dict.fromkeys(cut)))}, which are too long for the text "
            "tower: shorten them",
            stacklevel=3,
        )
    return list(torch.cat(embeddings).split([len(group) for group in prompts.values()]))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, then restore the mode of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple. Raise ValueError unless they are different, non-empty strings."""
    if isinstance(classes, str):
        raise ValueError(f"classes must be a list of names, got the string {describe(classes)}")
    if not isinstance(classes, Iterable) or isinstance(classes, Tensor):
        raise TypeError(f"classes must be a list of names, got {describe(classes)}")
    classes = tuple(classes)
    if not classes:
        raise ValueError("classes must name at least one class, got none")
    for name in classes:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classes must be non-empty strings, got {describe(name)}")
    if len(set(classes)) < len(classes):
        repeated = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes must differ, got {repeated!r} {classes.count(repeated)} times")
    return classes


def check_templates(templates: Sequence[str], name: str = "templates") -> tuple[str, ...]:
    """Templates as a tuple. Raise ValueError unless there is at least one and each has a `{}`."""
    if isinstance(templates, str):
        raise ValueError(f"{name} must be a list of prompts, got the string {describe(templates)}")
    if not isinstance(templates, Iterable) or isinstance(templates, Tensor):
        raise TypeError(f"{name} must be a list of prompts, got {describe(templates)}")
    templates = tuple(templates)
    if not templates:
        raise ValueError(f"{name} must hold at least one prompt, got none")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"{name} must hold {{}} in place of the class name, got {describe(template)}")
    return templates
