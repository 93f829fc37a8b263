"""Golden rankings: the order in which an image's patches may go, by taking windows of them away and looking.

    score of a window T: P(label | X∖T), max P(class | X∖T), or cos(z, z∖T);  of a patch: the mean over its windows

In rounds: the patches that score highest go, the others are scored again without them. What enters the block is
computed once, with its queries, keys and values, of which a variant gathers the rows it keeps; windows that hold the
same patches are one variant; variants of one length run together.
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
from clipkernels.classifier import eval_mode
from clipkernels.encode import check_images
from clipkernels.fingerprint import fingerprint, fingerprinted_module
from clipkernels.heads import ZeroShot
from clipkernels.heads.arguments import check_labels
from clipkernels.learn.patch_ranking.rankings import Rankings, RankingStore
from clipkernels.learn.patch_ranking.subset_embeddings import BlockInput, embed_subsets, run_to_block
from clipkernels.reference.predict import pool_channels
from clipkernels.reference.ranking import strongest_first

Score = Literal["label", "confidence", "feature"]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""Scores (V,) fp64 of embeddings (V,E), each of the image at (V,)."""

MAX_IMAGES_PER_PART = 16
"""At most so many images are ranked together, and then on disk."""
POOLED_CHANNELS = 64


class SearchOptions(NamedTuple):
    """How patches are tried: before which block, in which windows (W,w·w), how many go in a round, how many variants
    run at once."""

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
    progress: Callable[[int, int], object] | None = None,
) -> Rankings:
    """The order in which the patches of each image may go before a block, by what their removal does to the answer.

    A patch's score is the mean over the windows that contain it; a window is tried while it holds a patch, and removes
    what it holds. The `step` patches that score highest go, the others are scored again, until none is left. The tower
    runs dense and in eval mode, whatever it is patched with.

    Args:
        model: what `ck.patch` takes, with a tower whose patches are a grid.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S), which are taken one by one, those that are None left
            out.
        score: "label", the probability of the true class; "confidence", the largest of any class; "feature", the cosine
            to the embedding of the whole image.
        text: class embeddings (K,E) for the first two; need not be normalised.
        labels: (n,) the true classes, for "label".
        window: side of a window, in patches.
        stride: patches from one window to the next, at most `window`; where the last one does not reach the edge,
            another stands there. The released code has stride = window.
        step: patches that go in a round.
        block: zero-based block before which they go.
        batch_size: variants that run at once.
        path: of a safetensors file with the result; what is done is beside it at once, and is not done again.
        progress: called with how many images are done, and of how many.
    Returns:
        Rankings: ranks (n,P) int64, 0 for the patch that stays longest; and what enters the block, channels pooled.
    Raises:
        ValueError: options that do not fit the tower or each other, no images or some of another size, labels out of
            range, or a file of rankings that were made otherwise.
        UnsupportedTower: as in `ck.patch`.
    Guarantees: deterministic on one machine for the same images in the same order and one `batch_size`, interrupted or
        not. Otherwise scores are equal to rounding, and patches whose scores nearly tie may change places. Of equal
        scores the lower index goes first; NaN counts as -inf.
        Probabilities are fp64 numbers, so that those near one still differ.
    Source: Patch Ranking, arXiv 2409.14607, section 3.1. Its scores are of single patches or of disjoint windows.
    """
    if not len(images):
        raise ValueError("images must be at least one, got none")
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
        },
        classes,
    )
    search = SearchOptions(block, windows_of(grid, window, stride).to(tower.like.device), step, batch_size)
    digests: list[bytes | None] = []
    with torch.inference_mode(), eval_mode(model):
        together = min(MAX_IMAGES_PER_PART, -(-4 * batch_size // len(search.windows)))
        for group in _unranked_groups(images, true, tower.image_size, store, digests, together):
            batch = torch.stack([image for image, _ in group.values()]).to(tower.like)
            labelled = torch.tensor([label for _, label in group.values()], device=batch.device)
            ranks, features = _rank_images(tower, batch, search, score, classes, labelled)
            store.add(list(group), ranks, features)
            if progress is not None:
                progress(len(digests), len(images))
        if progress is not None:
            progress(len(images), len(images))
    if not any(digests):
        raise ValueError(f"images must be at least one, got {len(images)} that are None")
    return store.finish([digest for digest in digests if digest is not None])


def windows_of(grid: tuple[int, int], window: int, stride: int) -> Tensor:
    """The patches (W,window·window) of every window over a grid, row by row."""
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
    """Ranks (b,P) of images (b,3,S,S), and what enters the block, its channels pooled, (b,S,G)."""
    entering = run_to_block(tower, images, search.block)
    batch, tokens = entering.x.shape[:2]
    if classes is None:
        every = torch.arange(tokens, device=images.device).expand(batch, -1)
        dense = normalize(embed_subsets(tower, entering, torch.arange(batch, device=images.device), every).double())
    else:
        dense = None
    alive = torch.ones(batch, tokens - tower.prefix, dtype=torch.bool, device=images.device)
    ranks = torch.zeros_like(alive, dtype=torch.int64)

    def scores(embeddings: Tensor, image: Tensor) -> Tensor:
        embeddings = normalize(embeddings.double())
        if dense is not None:
            return (embeddings * dense[image]).sum(1)
        assert classes is not None
        shares = (100 * embeddings @ classes.T).softmax(1)
        return shares.gather(1, labels[image][:, None])[:, 0] if score == "label" else shares.amax(1)

    left = alive.shape[1]
    while left:
        found = _patch_scores(tower, entering, alive, search, scores)
        order = strongest_first(found)
        # Those that are gone come last, whatever the others score.
        order = order.gather(1, alive.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
        leaving = order[:, : min(search.step, left)]
        places = torch.arange(left - 1, left - 1 - leaving.shape[1], -1, device=images.device)
        ranks.scatter_(1, leaving, places.expand_as(leaving))
        alive.scatter_(1, leaving, False)
        left -= leaving.shape[1]
    return ranks, pool_channels(entering.x, POOLED_CHANNELS)


def _patch_scores(tower: Tower, entering: BlockInput, alive: Tensor, search: SearchOptions, scores: Scorer) -> Tensor:
    """The score (b,P) fp64 of every patch that is there: the mean over its windows."""
    batch, patches = alive.shape
    there = alive[:, search.windows]  # [b, W, w·w]
    held = torch.where(there, search.windows, patches).sort(2).values
    owners = torch.arange(batch, device=alive.device)[:, None, None].expand(-1, held.shape[1], 1)
    tried = there.any(2)
    variants, which = torch.cat([owners, held], 2)[tried].unique(dim=0, return_inverse=True)
    image, gone = variants[:, 0], variants[:, 1:]
    kept = torch.ones(len(variants), tower.prefix + patches + 1, dtype=torch.bool, device=alive.device)
    kept[:, tower.prefix : -1] = alive[image]
    kept.scatter_(1, gone + tower.prefix, False)
    kept = kept[:, :-1]  # where the places of patches that are not there point
    counts = kept.sum(1)
    value = torch.full((len(variants),), float("-inf"), dtype=torch.float64, device=alive.device)
    for count in counts.unique().tolist():
        alike = (counts == count).nonzero()[:, 0]
        for some in alike.split(search.batch_size) if count else ():  # a tower without CLS needs one token
            rows = kept[some].nonzero()[:, 1].view(-1, count)
            value[some] = scores(embed_subsets(tower, entering, image[some], rows), image[some])
    of_window = torch.zeros(tried.shape, dtype=torch.float64, device=alive.device)
    of_window[tried] = value.nan_to_num(float("-inf"), neginf=float("-inf"))[which]
    total, times = of_window.new_zeros(batch, patches), of_window.new_zeros(patches)
    # Patch by patch of a window: no two add to the same place, so that the order of summation is fixed.
    for column in range(search.windows.shape[1]):
        total.index_add_(1, search.windows[:, column], of_window)
        times.index_add_(0, search.windows[:, column], torch.ones_like(of_window[0]))
    return total / times


def _unranked_groups(
    images: Tensor | Sequence[Tensor | None],
    labels: Sequence[int] | None,
    size: tuple[int, int],
    store: RankingStore,
    digests: list[bytes | None],
    together: int,
) -> Iterator[dict[bytes, tuple[Tensor, int]]]:
    """Images that are not ranked yet, so many at a time, with labels, by their digests; `digests` gets all of them.

    Raises:
        ValueError: an image of another size.
    """
    waiting: dict[bytes, tuple[Tensor, int]] = {}
    for index in range(len(images)):
        image = images[index]
        if image is None:
            digests.append(None)
            continue
        check_images(image[None], size)
        label = -1 if labels is None else labels[index]
        digest = _digest(image, label)
        digests.append(digest)
        if digest not in store.rows:
            waiting[digest] = image, label
        if len(waiting) == together:
            yield waiting
            waiting = {}
    if waiting:
        yield waiting


def _digest(tensor: Tensor, label: int = -1) -> bytes:
    plain = tensor.detach().float().cpu().contiguous()
    return sha256(plain.numpy().tobytes() + str((label, tuple(plain.shape))).encode()).digest()


def _patch_grid(tower: Tower) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: the patches are no grid.
    """
    height, width = (side // tower.patch for side in tower.image_size)
    if height * width != tower.num_tokens - tower.prefix:
        came = f"{tower.num_tokens - tower.prefix} of an image of {tower.image_size}"
        raise ValueError(f"model must have a grid of patches of side {tower.patch}, got {came}")
    return height, width


def _class_embeddings(score: str, text: Tensor | None, tower: Tower) -> Tensor:
    """Class embeddings (K,E), normalised, fp64."""
    if text is None:
        raise ValueError(f'text must be the class embeddings (K,E) for score="{score}", got none')
    classes = ZeroShot(text).text
    if classes.shape[1] != tower.out:
        raise ValueError(f"text must be (K,E) with E = {tower.out}, got {tuple(text.shape)}")
    return classes.double().to(tower.like.device)


def _true_labels(labels: Tensor | Sequence[int] | None, images: int, classes: Tensor | None) -> list[int]:
    """The true classes of the images."""
    if labels is None:
        raise ValueError('labels must be the true classes (n,) for score="label", got none')
    assert classes is not None
    return check_labels(torch.as_tensor(labels), images, len(classes)).tolist()


def _check_options(
    tower: Tower, grid: tuple[int, int], score: str, window: int, stride: int, step: int, block: int, batch_size: int
) -> None:
    """Raises ValueError for options that cannot be."""
    if score not in get_args(Score):
        raise ValueError(f'score must be "label", "confidence" or "feature", got {score!r}')
    limits = {
        "window": (window, 1, min(grid)),
        "stride": (stride, 1, window),
        "step": (step, 1, grid[0] * grid[1]),
        "block": (block, 0, len(tower.blocks) - 1),
    }
    for name, (given, low, high) in limits.items():
        if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
            raise ValueError(f"{name} must be an int from {low} to {high}, got {given!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
