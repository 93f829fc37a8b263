"""Learnt tokens that join an image's patches, to make up for the patches that a predictor removes.

    block d < D begins with [CLS, P_d, patches];  coupled to a context c_d of the text, P_d = M_d c_d + b_d

The tokens are never pruned. Each of the first D blocks starts with new ones; later blocks continue with the outputs of
block D - 1. If coupled, the same contexts replace the first words of every prompt in the text tower's blocks. This is
a reconstruction: the paper does not state the number of tokens or the depth, so both are MaPLe's (arXiv 2210.03117).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import Tokenizer, ids_of
from clipkernels.arguments import check_flags, check_int, check_mapping, check_range, check_tensors, describe
from clipkernels.classifier import check_clip, check_prompt_lists, class_embeddings, eval_mode
from clipkernels.encode import check_images_list, encode_image
from clipkernels.fingerprint import check_fingerprint, digest_of, fingerprint, fingerprinted_module
from clipkernels.formats import Count, Fingerprint, Format, Size, TensorSpec
from clipkernels.heads.arguments import check_labels
from clipkernels.learn.checkpoints import check_training, load_module, save_module, seeded, weight_specs
from clipkernels.learn.patch_ranking.text_contexts import check_prompts, first_words, injected_contexts, text_tower
from clipkernels.messages import quantity
from clipkernels.methods import PatchRanking
from clipkernels.patching import patched

INIT_STD = 0.02


class VisualTokens(nn.Module):
    """Learnt tokens for the first blocks of a tower: free parameters, or linear maps of contexts of the text tower.

    Args:
        count: T, tokens per block.
        depth: D, the number of blocks that start with new tokens.
        width: C of the tower.
        text_width: width of the text tower for tokens that are maps of its contexts; 0 for free tokens.
        about: properties of the towers: "tower" and "text", their fingerprints.
    Raises:
        ValueError: a count, depth or width below one, or numbers that are no ints.
    Source: Patch Ranking, arXiv 2409.14607, section 3.3; MaPLe, arXiv 2210.03117.
    """

    def __init__(
        self, count: int, depth: int, width: int, text_width: int = 0, *, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        for name, value in (("count", count), ("depth", depth), ("width", width)):
            check_int(name, value, 1)
        check_int("text_width", text_width, 0)
        check_mapping(about={} if about is None else about)
        self.count, self.depth, self.width, self.text_width = count, depth, width, text_width
        self.about = dict(about or {})
        if text_width:
            self.context = nn.Parameter(INIT_STD * torch.randn(depth, count, text_width))
            self.maps = nn.ModuleList(nn.Linear(text_width, width) for _ in range(depth))
        else:
            self.own = nn.Parameter(INIT_STD * torch.randn(depth, count, width))

    def forward(self) -> Tensor:
        """The tokens (D,T,C) of each block."""
        if not self.text_width:
            return self.own
        return torch.stack([layer(context) for layer, context in zip(self.maps, self.context, strict=True)])

    def class_embeddings(self, model: Any, tokenizer: Tokenizer, prompts: Mapping[str, Sequence[str]]) -> Tensor:
        """Class embeddings (K,E) fp32; contexts, if there are any, replace the first words of every prompt.

        Raises:
            ValueError: a text tower without open_clip's or OpenAI's blocks, or another one than in training;
                prompts that do not differ after the replaced words.
        """
        check_prompt_lists(prompts)
        if not self.text_width:
            return class_embeddings(model, tokenizer, prompts)
        if "text" in self.about:
            check_fingerprint(self.about["text"], text_tower(model), "the learnt tokens' text", self.about)
        sentences = [sentence for group in prompts.values() for sentence in group]
        ids = ids_of(tokenizer, sentences, find_text_encoder(model).context)
        check_prompts(model, ids, [len(group) for group in prompts.values()], self.count)
        with injected_contexts(model, self.context):
            return class_embeddings(model, tokenizer, prompts)

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless these tokens were trained for the tower."""
        if self.width != tower.width or self.depth > len(tower.blocks):
            raise ValueError(
                f"the learnt tokens are for a tower of width {self.width} and at least "
                f"{quantity(self.depth, 'block')}, got width {tower.width} and {quantity(len(tower.blocks), 'block')}"
            )
        if "tower" in self.about:
            check_fingerprint(self.about["tower"], fingerprinted_module(tower), "the learnt tokens", self.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens and the fingerprints of their towers as safetensors, through a temporary file.

        Raises:
            ValueError: tokens that are not finite, or unknown properties in `about`.
            OSError: the file cannot be written.
        """
        save_module(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VisualTokens:
        """The tokens that `save` wrote, in fp32, on the CPU.

        Raises:
            ValueError: the file holds no learnt tokens, or not those that were written.
            OSError: the file cannot be read.
        """
        return load_module(cls, path, FORMAT)

    def __repr__(self) -> str:
        coupled = f", text_width={self.text_width}" if self.text_width else ""
        return f"VisualTokens(count={self.count}, depth={self.depth}{coupled}, sha256={digest_of(self)})"


class About(msgspec.Struct, forbid_unknown_fields=True):
    """Facts about the towers and the training."""

    tower: Fingerprint | msgspec.UnsetType = msgspec.UNSET
    text: Fingerprint | msgspec.UnsetType = msgspec.UNSET
    images: Size | msgspec.UnsetType = msgspec.UNSET
    keep: Annotated[float, msgspec.Meta(gt=0, le=1)] | msgspec.UnsetType = msgspec.UNSET
    block: Count | msgspec.UnsetType = msgspec.UNSET


class TokensHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a file of learnt tokens: the arguments of `VisualTokens`."""

    count: Size
    depth: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    width: Size
    text_width: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    about: About


def _tensors(header: TokensHeader) -> dict[str, TensorSpec]:
    if not header.text_width:
        return weight_specs({"own": "depth count width"})
    weights = {f"maps.{block}.weight": "width text_width" for block in range(header.depth)}
    biases = {f"maps.{block}.bias": "width" for block in range(header.depth)}
    return weight_specs({"context": "depth count text_width", **weights, **biases})


FORMAT = Format("clipkernels.visual_tokens.2", "learnt tokens", TokensHeader, _tensors)


class FittedTokens(NamedTuple):
    """Learnt tokens and the mean loss of each epoch."""

    tokens: VisualTokens
    losses: list[float]


@torch.enable_grad()
def fit_tokens(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Mapping[str, Sequence[str]],
    images: Tensor | Sequence[Tensor],
    labels: Tensor,
    method: PatchRanking,
    *,
    count: int = 2,
    depth: int = 9,
    coupled: bool = False,
    epochs: int = 5,
    batch_size: int = 4,
    lr: float = 0.0035,
    weight_decay: float = 5e-4,
    scale: float = 100.0,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> FittedTokens:
    """Tokens trained on a few labelled images through the pruned tower; nothing else is trained.

    The optimizer is SGD with momentum 0.9 on cross-entropy; its learning rate falls along a cosine. Model and predictor
    are frozen and in eval mode during the training and restored afterwards.

    Args:
        model: a model that `ck.Classifier` takes, in fp32 or fp64.
        tokenizer: a callable from a list of n texts to token ids (n,T), or a tokenizer or a processor of transformers.
        prompts: the sentences of each class, such as those of `clipkernels.support.photo`.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S).
        labels: (n,) int64, into the classes of `prompts`.
        method: the method that prunes the tower; its own tokens, if any, are not used.
        count: number of learnt tokens.
        depth: blocks that start with new tokens; all blocks of a shallower tower.
        coupled: derive the tokens from contexts that also replace each prompt's first words in the text tower.
        epochs: passes over the images.
        batch_size: images per step.
        lr: initial learning rate.
        weight_decay: weight decay of SGD.
        scale: factor of the cosines.
        seed: seed of the tokens and of the order of the images.
        progress: called after each epoch with its number, from 1, and its mean loss.
    Returns:
        FittedTokens, for `ck.PatchRanking(…, tokens=…)`. If coupled, compute class embeddings with
        `tokens.class_embeddings`, as `ck.Classifier` does.
    Raises:
        ValueError: labels or images that do not fit, numbers out of range, a half-precision model, a model that is no
            CLIP; if `coupled`, a text tower without open_clip's or OpenAI's blocks, or prompts that do not differ
            after the replaced words.
        RuntimeError: in inference mode.
    Source: Patch Ranking, arXiv 2409.14607, section 3.3; the numbers are MaPLe's, arXiv 2210.03117.
    """
    check_training("fit_tokens", epochs, batch_size, seed, progress, lr=lr, scale=scale)
    check_int("count", count, 1)
    check_int("depth", depth, 1)
    check_flags(coupled=coupled)
    check_range("weight_decay", weight_decay, 0, math.inf, "[)")
    if not isinstance(method, PatchRanking):
        raise TypeError(f"method must be a PatchRanking, got {describe(method)}")
    check_images_list(images)
    check_prompt_lists(prompts)
    check_clip(model)
    tower = adapters.find_tower(model)
    like = tower.like
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model must be float32 or float64 to train through, got {like.dtype}")
    labels = check_labels(labels, len(images), len(prompts)).to(like.device)
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    sizes = [len(group) for group in prompts.values()]
    sentences = [sentence for group in prompts.values() for sentence in group]
    ids = ids_of(tokenizer, sentences, find_text_encoder(model).context).to(like.device)
    about: dict[str, Any] = {"tower": fingerprint(fingerprinted_module(tower)), "images": len(images)}
    about |= {"keep": method.keep, "block": method.block}
    width = 0
    if coupled:
        check_prompts(model, ids, sizes, count)
        about["text"], width = fingerprint(text_tower(model)), text_tower(model).width
    with seeded(seed):
        tokens = VisualTokens(count, min(depth, len(tower.blocks)), tower.width, width, about=about).to(like)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(tokens.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // batch_size))
    losses = []
    with eval_mode(model), _frozen_parameters(model), patched(model, replace(method, tokens=tokens)):
        if coupled:
            with torch.no_grad():
                tokens.context[0].copy_(first_words(model, ids[:1], count))
        else:
            text = class_embeddings(model, tokenizer, prompts).to(like)
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                if coupled:
                    with injected_contexts(model, tokens.context):
                        text = _class_embeddings(model, ids, sizes)
                chosen = {f"images[{index}]": images[index] for index in batch.tolist()}
                check_tensors(**chosen)
                pixels = torch.stack(list(chosen.values())).to(like)
                logits = scale * normalize(encode_image(model, pixels).embedding) @ text.T
                loss = cross_entropy(logits, labels[batch.to(like.device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / len(images))
            if progress is not None:
                progress(epoch + 1, losses[-1])
    return FittedTokens(tokens.cpu().eval(), losses)


def _class_embeddings(model: Any, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Class embeddings (K,E), differentiable."""
    rows = normalize(model.encode_text(ids)).split(list(sizes))
    return torch.stack([normalize(of_class.mean(0), dim=0) for of_class in rows])


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Freeze the model's parameters, and restore their `requires_grad` on exit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
