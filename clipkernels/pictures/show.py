"""`clipkernels.show`: images as a tower sees them, and the patches that methods leave of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.arguments import check_calls, check_flags, check_int, check_model, describe, is_list
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image, tower_weight
from clipkernels.images.batches import Pictures, image_shape, to_rgb
from clipkernels.messages import list_items, printable, quantity
from clipkernels.method_names import short_name
from clipkernels.methods import Dense, Method
from clipkernels.patching import patched, tower_of
from clipkernels.pictures.moves import Inputs, Moves, batches_of, measure_moves
from clipkernels.pictures.panel import Geometry, colour, draw_panel
from clipkernels.pictures.patches import Patches, choose_blocks, describe_blocks, patches_by_block, untouched
from clipkernels.pictures.sheet import LEGEND, Layout, Panel, Row, draw_sheet
from clipkernels.plan import Plan
from clipkernels.tower import make_plan

MAX_IMAGES = 16
"""Images that are shown without `worst`."""
MAX_WORST = 64
MAX_PANELS = 6
"""Panels in a row of several images."""
SWATCH = 24  # pixels, at least, of a patch in the legend
Methods = Method | Sequence[Method] | Mapping[str, Method]


def show(
    model: nn.Module,
    images: Any,
    methods: Methods,
    *,
    preprocess: Preprocess,
    worst: int | None = None,
    all_steps: bool = False,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """A picture of images as the tower sees them, and of the patches that methods leave.

    A kept patch shows its own pixels. Merged patches have the mean colour and one outline per token, fused ones are
    hatched, dropped ones blank. One image has a row per method, and a column for each of at most four blocks. Several
    images have a row each, with what every method leaves at the end.

    Args:
        model: a model that `patch` takes; what it is patched with stays as it is and counts for nothing here.
        images: an image or a list of images: paths, PIL images or preprocessed tensors (3,S,S); at most 16 of them
            unless `worst` is given.
        methods: a method, a list of them, or a dict from the names that are shown to methods.
        preprocess: the model's, from a PIL image to a tensor (3,S,S); it tells the colours too.
        worst: show this many images, at most 64, those whose embedding moved most.
        all_steps: show the patches after every block that has a step.
        names: of the images, instead of their file names.
    Returns:
        A PIL image, RGB. Each pixel of an image is a square of whole pixels.
    Raises:
        ValueError: no images, too many of them, one that cannot be read, or a method that does not fit the tower.
        UnsupportedTower: as in `patch`, or patches that are no grid.
    """
    check_model(model)
    check_calls(preprocess=preprocess)
    check_flags(all_steps=all_steps)
    images, named = list_images(images), name_methods(methods)
    check_counts(len(images), worst)
    if names is None:
        names = [f"image {place}" if len(images) > 1 else "" for place in range(len(images))]
        paths = {place: os.fspath(item) for place, item in enumerate(images) if isinstance(item, (str, os.PathLike))}
        names = [paths.get(place, name) for place, name in enumerate(names)]
    elif not is_list(names) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list of texts, got {describe(names)}")
    elif len(names) != len(images):
        raise ValueError(f"names must be one per image, {len(images)} here, got {len(names)}")
    dataset = Inputs(images, preprocess, image_shape(model, preprocess))
    moves = measure_moves(model, batches_of(dataset), named)
    for place, reason in moves.failed:
        raise ValueError(
            f"expected images that can be used, got {list_items([printable(names[place] or 'one')])}: {reason}"
        )
    return draw_moves(model, dataset, moves if worst is None else moves.worst(worst), named, names, all_steps)


def list_images(images: Any) -> list[Any]:
    """Images as a list; raise TypeError unless they are an image or a list of images, of a kind that is read."""
    kinds = (str, os.PathLike, Image.Image)
    if isinstance(images, kinds) or (isinstance(images, Tensor) and images.ndim == 3):
        return [images]
    listed = list(images) if is_list(images) or (isinstance(images, Tensor) and images.ndim == 4) else [None]
    for item in listed:
        if not isinstance(item, (*kinds, Tensor)):
            kind = describe(images if item is None else item)
            raise TypeError(f"images must be paths, PIL images or tensors (3,S,S), got {kind}")
    return listed


def name_methods(methods: Methods) -> dict[str, Method]:
    """Methods by name.

    Raises:
        TypeError: a method that is none, or a name that is no text.
        ValueError: no methods.
    """
    listed: Any = methods if is_list(methods) or isinstance(methods, Mapping) else [methods]
    if not listed:
        raise ValueError("methods must hold at least one method such as ck.ToMe(r=8), got none")
    pairs = listed.items() if isinstance(listed, Mapping) else ((None, method) for method in listed)
    named = {}
    for name, method in pairs:
        if isinstance(method, type) or not callable(getattr(method, "plan", None)):
            raise TypeError(f"methods must be methods such as ck.ToMe(r=8), got {describe(method)}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"methods must be named by texts, got {describe(name)}")
        named[short_name(method) if name is None else name] = method
    return named


def check_counts(images: int, worst: int | None) -> None:
    """Raise ValueError for a number of images that cannot be shown."""
    if not images:
        raise ValueError("images must hold at least one image, got none")
    if worst is not None:
        check_int("worst", worst, 1, MAX_WORST)
    elif images > MAX_IMAGES:
        raise ValueError(f"expected at most {MAX_IMAGES} images, got {images}: show the worst {MAX_IMAGES} of them")


class _Subject(NamedTuple):
    """An image that is drawn: pixels (H,W,3) uint8, its name, and per method the cosine and the patches by block."""

    pixels: np.ndarray
    name: str
    cosines: Sequence[float]
    patches: Sequence[Sequence[Patches]]


def draw_moves(
    model: nn.Module,
    dataset: Pictures,
    moves: Moves,
    methods: Mapping[str, Method],
    names: Sequence[str],
    all_steps: bool = False,
) -> Image.Image:
    """The picture of the images of `moves`, as `show` describes it.

    Args:
        model: as in `show`.
        dataset: all images that were given.
        moves: at least one image.
        methods: by name, as the columns of the cosines.
        names: of all images that were given.
        all_steps: as in `show`.
    """
    tower = tower_of(model)
    plans = {name: make_plan(method, tower, tower.num_tokens) for name, method in methods.items()}
    geometry = _geometry(tower, next(iter(plans.values())))
    subjects = list(_subjects(model, dataset, moves, methods, plans, names))
    blocks = choose_blocks(list(plans.values()), all_steps)
    each_step = all_steps or len(subjects) == 1
    if each_step:
        rows = [row for subject in subjects for row in _rows_by_step(subject, plans, geometry, blocks)]
    else:
        rows = list(_rows_by_image(subjects, plans, geometry))
    states = [
        name
        for name in LEGEND
        if name == "kept" or any(getattr(last[-1], name).any() for subject in subjects for last in subject.patches)
    ]
    return draw_sheet(
        rows,
        Layout(*geometry.size, titled=each_step),
        states,
        _sample(subjects[0].pixels, geometry),
        list(_notes(plans, geometry, blocks, each_step)),
    )


@torch.no_grad()
def _subjects(
    model: nn.Module,
    dataset: Pictures,
    moves: Moves,
    methods: Mapping[str, Method],
    plans: Mapping[str, Plan],
    names: Sequence[str],
) -> Iterator[_Subject]:
    """The images of `moves`, in order, each with its patches under every method."""
    weight = tower_weight(model)
    with patched(model, Dense()):
        for place, cosines in zip(moves.indices, moves.cosines, strict=True):
            image = dataset[place][1]
            if isinstance(image, str):  # the file has changed meanwhile
                raise ValueError(f"expected an image that can be read again, got {printable(names[place])}: {image}")
            states = []
            for name, method in methods.items():
                with patched(model, method):
                    source = encode_image(model, image[None].to(weight), source=True).source
                assert source is not None
                states.append(patches_by_block(source[0].cpu().numpy(), plans[name]))
            pixels = (to_rgb(image, dataset.preprocess) * 255).round().byte().permute(1, 2, 0).numpy()
            yield _Subject(pixels, printable(names[place]), cosines.tolist(), states)


def _geometry(tower: Tower, plan: Plan) -> Geometry:
    """The grid of a tower's patches.

    Raises:
        UnsupportedTower: its tokens are no such grid.
    """
    geometry = Geometry.of(*tower.image_size, tower.patch)
    if geometry.rows * geometry.columns != plan.entry - plan.prefix:
        expected = f"expected a tower with a grid of {geometry.rows} × {geometry.columns} patches"
        raise UnsupportedTower(f"{expected}, got {plan.entry - plan.prefix}")
    return geometry


def _rows_by_step(
    subject: _Subject, plans: Mapping[str, Plan], geometry: Geometry, blocks: Sequence[int]
) -> Iterator[Row]:
    """A row per method: the image, and its patches after each of the blocks."""
    for (name, plan), cosine, states in zip(plans.items(), subject.cosines, subject.patches, strict=True):
        if not any(plan.steps):
            yield Row(
                f"{name}:  no steps, {quantity(plan.entry, 'token')} to the end", [_whole(subject, plan, geometry)]
            )
            continue
        panels, outlines = [_whole(subject, plan, geometry)], None
        for place, block in enumerate(blocks):
            colouring = colour(subject.pixels, states[block], geometry, outlines)
            outlines = colouring.outlines
            caption = [f"after block {block}: {quantity(states[block].tokens, 'token')}", states[block].describe()]
            if place and states[block] is states[blocks[place - 1]]:
                caption[1] = f"no step since block {blocks[place - 1]}"
            panels.append(Panel(draw_panel(subject.pixels, states[block], colouring, geometry), caption))
        yield Row(f"{name}:  {plan.entry} to {plan.tokens[-1]} tokens,  cosine to dense {cosine:.4f}", panels)


def _rows_by_image(subjects: Sequence[_Subject], plans: Mapping[str, Plan], geometry: Geometry) -> Iterator[Row]:
    """Rows of images, each followed by what every method leaves of it; several images in a row if methods are few."""
    panels: list[list[Panel]] = []
    for subject in subjects:
        panels.append([_whole(subject, next(iter(plans.values())), geometry)])
        for name, cosine, states in zip(plans, subject.cosines, subject.patches, strict=True):
            last = states[-1]
            drawn = draw_panel(subject.pixels, last, colour(subject.pixels, last, geometry), geometry)
            caption = [name, f"{quantity(last.tokens, 'token')}, cosine to dense {cosine:.4f}"]
            panels[-1].append(Panel(drawn, caption))
    abreast = max(1, MAX_PANELS // (1 + len(plans)))
    for start in range(0, len(panels), abreast):
        yield Row("", [panel for group in panels[start : start + abreast] for panel in group])


def _whole(subject: _Subject, plan: Plan, geometry: Geometry) -> Panel:
    """The whole image."""
    patches = untouched(plan)
    drawn = draw_panel(subject.pixels, patches, colour(subject.pixels, patches, geometry), geometry)
    return Panel(drawn, [f"as the tower sees it: {quantity(plan.entry, 'token')}", subject.name])


def _sample(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The two neighbouring patches (side,2·side,3) of the liveliest colours, enlarged for the legend."""
    side, pairs = geometry.patch, max(1, geometry.columns // 2)
    covered = np.resize(pixels[: geometry.rows * side], (geometry.rows * side, max(pixels.shape[1], 2 * side), 3))
    cells = covered[:, : pairs * 2 * side].reshape(geometry.rows, side, pairs, 2 * side, 3)
    cells = cells.transpose(0, 2, 1, 3, 4).reshape(-1, side, 2 * side, 3)
    scale = -(-SWATCH // side)
    return cells[cells.std((1, 2)).sum(1).argmax()].repeat(scale, 0).repeat(scale, 1)


def _notes(plans: Mapping[str, Plan], geometry: Geometry, blocks: Sequence[int], each_step: bool) -> Iterator[str]:
    """The lines below the legend."""
    first = next(iter(plans.values()))
    others = f" and {first.prefix} more, which no step touches" if first.prefix else ""
    patches = f"{geometry.rows} x {geometry.columns} patches of {geometry.patch} pixels"
    yield (
        f"The {first.entry} tokens are {patches}{others}. "
        f"The {len(first.steps)} blocks are counted from 0. The cosine is that of the embedding with the dense one."
    )
    for name, plan in plans.items():
        own = {block for block, step in enumerate(plan.steps) if step is not None}
        hidden = each_step and len(own - set(blocks))
        yield f"{name}: {describe_blocks(plan)}{'; --all-steps or all_steps=True shows all' if hidden else ''}."
