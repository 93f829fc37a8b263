"""Golden rankings: the order in which an image's patches may be removed, found by removing windows of patches.

    score of a window T: P(label | X∖T), max P(class | X∖T), or cos(z, z∖T);  of a patch: the mean over its windows

The search runs in rounds: the patches of the highest scores are removed, then the others are scored again without
them. The block's input, queries, keys and values are computed once; a variant gathers the rows that it keeps. Windows
with the same remaining patches are one variant, and variants of one length run as one batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.arguments import check_callable, check_choice, check_int, check_tensors, describe
from clipkernels.classifier import eval_mode
from clipkernels.encode import check_images, check_images_list
from clipkernels.fingerprint import fingerprint, fingerprinted_module
from clipkernels.heads import ZeroShot
from clipkernels.heads.arguments import check_labels
from clipkernels.learn.patch_ranking.rankings import Rankings, RankingStore
from clipkernels.learn.patch_ranking.subset_embeddings import BlockInput, embed_subsets, run_to_block
from clipkernels.messages import quantity
from clipkernels.reference.predict import pool_channels
from clipkernels.reference.ranking import strongest_first

Score = Literal["label", "confidence", "feature"]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""Scores (V,) fp64 of embeddings (V,E) of variants of the images at index (V,)."""

MAX_IMAGES_PER_PART = 16
"""Limit of the images that are ranked together and written to disk as one part."""
POOLED_CHANNELS = 64


class SearchOptions(NamedTuple):
    """Options of the search.

    block: zero-based block before which patches are removed.
    windows (W,w·w): int64 patches of each window.
    step: patches removed per round.
    batch_size: variants that run as one batch.
    """

    block: int
    windows: Tensor
    step: int
    batch_size: int


def golden_ranking(
    model: nn.Module,
    images: Tensor | Sequence[Tensor | None],
    *,
    score: Score = "label",
    text: Tensor | None = None,
    labels: Tensor | Sequence[int] | None = None,
    window: int = 2,
    stride: int = 1,
    step: int = 10,
    block: int = 3,
    batch_size: int = 64,
    path: str | os.PathLike[str] | None = None,
    reader: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Rankings:
    """The order in which the patches of each image may be removed before a block, with the block's input.

    A patch's score is the mean over the windows that contain it. A window is tried as long as it holds a patch, by
    removing its remaining patches. In each round the `step` patches of the highest scores are removed and the others
    are scored again, until none is left. The tower runs dense and in eval mode, even if it is patched.

    Args:
        model: a model that `ck.patch` takes, with a tower whose patches are a grid.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S), which is read one by one; a None in it is skipped.
        score: "label", the probability of the true class; "confidence", the largest probability of any class;
            "feature", the cosine to the embedding of the whole image.
        text: class embeddings (K,E) for "label" and "confidence"; need not be normalised.
        labels: (n,) the true classes, for "label".
        window: side of a window, in patches.
        stride: patches from one window to the next, at most `window`; if the last one does not reach the edge, one
            more window is placed there. The released code has stride = window.
        step: patches removed per round.
        block: zero-based block before which the patches are removed.
        batch_size: variants that run as one batch.
        path: safetensors file for the result. Finished images are written next to it at once and are not ranked again.
        reader: `Reader.rules` of the images that `clipkernels.images` opened, to be stored with the options.
        progress: called with the number of finished images and the number of all images.
    Returns:
        Rankings: ranks (n,P) int64, 0 for the patch that stays longest; and the block's input with pooled channels.
    Raises:
        ValueError: options that do not fit the tower or each other, no images or images of another size, labels out of
            range, a file of rankings with other options, or features that are not finite and a path to store them.
        UnsupportedTower: as in `ck.patch`.
    Guarantees: deterministic on one machine for the same images in the same order and one `batch_size`, even if
        interrupted. Otherwise scores are equal up to rounding, and patches with nearly equal scores may swap. Of equal
        scores the lower index is removed first; NaN counts as -inf. Probabilities are fp64, because in fp32 those near
        one would tie.
    Source: Patch Ranking, arXiv 2409.14607, section 3.1, which scores single patches or disjoint windows. Its released
        code ranks by logits instead of probabilities, writes each round in reverse order, and stops at an error in the
        second round, whose patches are no square grid.
    """
    check_images_list(images)
    check_callable(progress=progress)
    tower = adapters.find_tower(model)
    grid = _patch_grid(tower)
    _check_options(tower, grid, score, window, stride, step, block, batch_size)
    classes = None if score == "feature" else _class_embeddings(score, text, tower)
    true = _true_labels(labels, len(images), classes) if score == "label" else None
    store = RankingStore(
        path,
        {
            **{"score": score, "window": window, "stride": stride, "step": step, "block": block},
            "tower": fingerprint(fingerprinted_module(tower)),
            "image_size": list(tower.image_size),
            "tokens": tower.num_tokens,
            "prefix": tower.prefix,
            "width": tower.width,
            "blocks": len(tower.blocks),
            "reader": reader,
        },
        classes,
    )
    search = SearchOptions(block, windows_of(grid, window, stride).to(tower.like.device), step, batch_size)
    digests: list[bytes | None] = []
    with torch.inference_mode(), eval_mode(model):
        group_size = min(MAX_IMAGES_PER_PART, -(-4 * batch_size // len(search.windows)))
        for group in _unranked_groups(images, true, tower.image_size, store, digests, group_size):
            batch = torch.stack([image for image, _ in group.values()]).to(tower.like)
            group_labels = torch.tensor([label for _, label in group.values()], device=batch.device)
            ranks, features = _rank_images(tower, batch, search, score, classes, group_labels)
            store.add(list(group), ranks, features)
            if progress is not None:
                progress(len(digests), len(images))
        if progress is not None:
            progress(len(images), len(images))
    if not any(digests):
        raise ValueError(f"images must hold at least one image, got {len(images)} that are None")
    return store.finish([digest for digest in digests if digest is not None])


def windows_of(grid: tuple[int, int], window: int, stride: int) -> Tensor:
    """The patches (W,window·window) int64 of every window over a grid, row by row."""
    starts = []
    for side in grid:
        steps = list(range(0, side - window + 1, stride))
        starts.append(steps if steps[-1] == side - window else [*steps, side - window])
    first = torch.tensor([top * grid[1] + left for top in starts[0] for left in starts[1]])
    within = torch.arange(window)[:, None] * grid[1] + torch.arange(window)
    return first[:, None] + within.flatten()


def _rank_images(
    tower: Tower, images: Tensor, search: SearchOptions, score: Score, classes: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks (b,P) of images (b,3,S,S), and the block's input with pooled channels, (b,S,G)."""
    block_input = run_to_block(tower, images, search.block)
    batch, tokens = block_input.x.shape[:2]
    if classes is None:
        all_tokens = torch.arange(tokens, device=images.device).expand(batch, -1)
        every_image = torch.arange(batch, device=images.device)
        dense = normalize(embed_subsets(tower, block_input, every_image, all_tokens).double())
    else:
        dense = None
    alive = torch.ones(batch, tokens - tower.prefix, dtype=torch.bool, device=images.device)
    ranks = torch.zeros_like(alive, dtype=torch.int64)

    def scores(embeddings: Tensor, image: Tensor) -> Tensor:
        embeddings = normalize(embeddings.double())
        if dense is not None:
            return (embeddings * dense[image]).sum(1)
        assert classes is not None
        probabilities = (100 * embeddings @ classes.T).softmax(1)
        return probabilities.gather(1, labels[image][:, None])[:, 0] if score == "label" else probabilities.amax(1)

    remaining = alive.shape[1]
    while remaining:
        order = strongest_first(_patch_scores(tower, block_input, alive, search, scores))
        # Removed patches come last even if the others score -inf.
        order = order.gather(1, alive.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
        removed = order[:, : min(search.step, remaining)]
        places = torch.arange(remaining - 1, remaining - 1 - removed.shape[1], -1, device=images.device)
        ranks.scatter_(1, removed, places.expand_as(removed))
        alive.scatter_(1, removed, False)
        remaining -= removed.shape[1]
    return ranks, pool_channels(block_input.x, POOLED_CHANNELS)


def _patch_scores(
    tower: Tower, block_input: BlockInput, alive: Tensor, search: SearchOptions, scores: Scorer
) -> Tensor:
    """The score (b,P) fp64 of every remaining patch: the mean over its windows."""
    batch, patches = alive.shape
    remaining = alive[:, search.windows]  # [b, W, w·w]
    window_patches = torch.where(remaining, search.windows, patches).sort(2).values
    image_index = torch.arange(batch, device=alive.device)[:, None, None].expand(-1, window_patches.shape[1], 1)
    is_tried = remaining.any(2)
    variants, variant_of_window = torch.cat([image_index, window_patches], 2)[is_tried].unique(
        dim=0, return_inverse=True
    )
    image, removed = variants[:, 0], variants[:, 1:]
    keep = torch.ones(len(variants), tower.prefix + patches + 1, dtype=torch.bool, device=alive.device)
    keep[:, tower.prefix : -1] = alive[image]
    keep.scatter_(1, removed + tower.prefix, False)
    keep = keep[:, :-1]  # drop the last column, which stands for removed patches
    counts = keep.sum(1)
    variant_score = torch.full((len(variants),), float("-inf"), dtype=torch.float64, device=alive.device)
    for count in counts.unique().tolist():
        same_count = (counts == count).nonzero()[:, 0]
        for chunk in same_count.split(search.batch_size) if count else ():  # a tower without CLS needs one token
            rows = keep[chunk].nonzero()[:, 1].view(-1, count)
            variant_score[chunk] = scores(embed_subsets(tower, block_input, image[chunk], rows), image[chunk])
    window_score = torch.zeros(is_tried.shape, dtype=torch.float64, device=alive.device)
    window_score[is_tried] = variant_score.nan_to_num(float("-inf"), neginf=float("-inf"))[variant_of_window]
    total, num_windows = window_score.new_zeros(batch, patches), window_score.new_zeros(patches)
    # One column of the windows at a time: within it no patch occurs twice, so the order of summation is fixed.
    for column in range(search.windows.shape[1]):
        total.index_add_(1, search.windows[:, column], window_score)
        num_windows.index_add_(0, search.windows[:, column], torch.ones_like(window_score[0]))
    return total / num_windows


def _unranked_groups(
    images: Tensor | Sequence[Tensor | None],
    labels: Sequence[int] | None,
    image_size: tuple[int, int],
    store: RankingStore,
    digests: list[bytes | None],
    group_size: int,
) -> Iterator[dict[bytes, tuple[Tensor, int]]]:
    """Groups of up to `group_size` unranked images with their labels, by digest.

    The digests of all images are appended to `digests`, None for a skipped one.

    Raises:
        ValueError: an image of another size.
    """
    group: dict[bytes, tuple[Tensor, int]] = {}
    for index in range(len(images)):
        image = images[index]
        if image is None:
            digests.append(None)
            continue
        check_tensors(**{f"images[{index}]": image})
        check_images(image[None], image_size)
        label = -1 if labels is None else labels[index]
        digest = _digest(image, label)
        digests.append(digest)
        if digest not in store.rows:
            group[digest] = image, label
        if len(group) == group_size:
            yield group
            group = {}
    if group:
        yield group


def _digest(tensor: Tensor, label: int = -1) -> bytes:
    values = tensor.detach().float().cpu().contiguous()
    return sha256(values.numpy().tobytes() + str((label, tuple(values.shape))).encode()).digest()


def _patch_grid(tower: Tower) -> tuple[int, int]:
    """The rows and columns of the patch grid.

    Raises:
        ValueError: the patches do not form a grid.
    """
    height, width = (side // tower.patch for side in tower.image_size)
    patches = tower.num_tokens - tower.prefix
    if height * width != patches:
        raise ValueError(
            f"model must have a grid of patches of side {tower.patch}, got {quantity(patches, 'patch')} of an image of "
            f"{tower.image_size}"
        )
    return height, width


def _class_embeddings(score: str, text: Tensor | None, tower: Tower) -> Tensor:
    """Normalised class embeddings (K,E), fp64, on the tower's device."""
    if text is None:
        raise ValueError(f'text must be the class embeddings (K,E) for score="{score}", got none')
    classes = ZeroShot(text).text
    if classes.shape[1] != tower.out:
        raise ValueError(f"text must be (K,E) with E = {tower.out}, got {tuple(text.shape)}")
    return classes.double().to(tower.like.device)


def _true_labels(labels: Tensor | Sequence[int] | None, images: int, classes: Tensor | None) -> list[int]:
    """The true classes of the images, checked."""
    if labels is None:
        raise ValueError('labels must be the true classes (n,) for score="label", got none')
    assert classes is not None
    try:
        true = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be the true classes (n,), got {describe(labels)}") from error
    return check_labels(true, images, len(classes)).tolist()


def _check_options(
    tower: Tower, grid: tuple[int, int], score: str, window: int, stride: int, step: int, block: int, batch_size: int
) -> None:
    """Raise ValueError for an unknown score and for numbers that are not ints or are out of range."""
    check_choice("score", score, *get_args(Score))
    check_int("window", window, 1, min(grid))
    check_int("stride", stride, 1, window)
    check_int("step", step, 1, grid[0] * grid[1])
    check_int("block", block, 0, len(tower.blocks) - 1)
    check_int("batch_size", batch_size, 1)
