"""Numbers of image tokens: planned from sizes alone before a forward, and checked after it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.block import Ranking
from clipkernels.layered_class import host_of
from clipkernels.marks import choose_slots
from clipkernels.messages import quantity
from clipkernels.methods import Method, Select
from clipkernels.slot import SLOT
from clipkernels.tower import make_plan
from clipkernels.vlm.families import family_of


def tower_of(container: Any) -> adapters.Tower:
    """The image tower of a container."""
    module: nn.Module = container.vision_tower if hasattr(container, "vision_tower") else container.vision_model
    return adapters.find_tower(module)


def method_of(container: Any) -> Method:
    """The method of a container's tower, which is patched."""
    method: Method = tower_of(container).owner.__dict__[SLOT].method
    return method


def prefix_of(container: Any, values: Mapping[str, Any]) -> int:
    """The number of rows before the patches that the host passes on.

    Args:
        container: the module that owns tower, projector and language model.
        values: arguments of the host's `get_image_features`, which may name a strategy.
    Raises:
        ValueError: the host would take a patch for CLS.
    """
    strategy = _option(container, values, "vision_feature_select_strategy")
    if strategy is None:
        return 0
    tower = tower_of(container)
    if strategy == "default" and not tower.prefix:
        raise ValueError(
            'expected vision_feature_select_strategy="full" for a tower without CLS, got "default", which drops a patch'
        )
    return tower.prefix - (strategy == "default")


def chosen(method: Method, tokens: int) -> int:
    """The number that a method leaves of the image tokens of a tower that stays whole."""
    return sum(method.counts(tokens)) if isinstance(method, Select) else tokens


def planned(container: Any, patches: int, values: Mapping[str, Any]) -> int:
    """The number of image tokens that the patches of one image become, those of CLS included if the host passes it on.

    Args:
        container: the module that owns tower, projector and language model.
        patches: patches of the image.
        values: arguments of the host's `get_image_features`, which may name a layer and a strategy.
    """
    tower, method = tower_of(container), method_of(container)
    plan = make_plan(method, tower, tower.prefix + patches)
    blocks, layer = len(plan.steps), _option(container, values, "vision_feature_layer")
    # Index i of the hidden states is what leaves block i - 1.
    layers = [blocks] if layer is None else list(layer) if isinstance(layer, (list, tuple)) else [layer]
    last = max(index % (blocks + 1) for index in layers)
    remaining = (plan.passes[last - 1][1] - plan.learnt if last else plan.entry) - plan.prefix
    return prefix_of(container, values) + chosen(method, remaining // family_of(container).cell(container) ** 2)


def check_counts(container: Any, image_features: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless every image has the number of rows that its plan leaves.

    Args:
        container: the module that owns tower, projector and language model.
        image_features: rows (B,S,C), or a sequence of rows (n·S,C) of n tiles; NaN in each that is not handed over.
        values: arguments of the host's `get_image_features`.
    """
    height, width = (int(side) // tower_of(container).patch for side in values["pixel_values"].shape[-2:])
    slots = prefix_of(container, values) + height * width // family_of(container).cell(container) ** 2
    plan = planned(container, height * width, values)
    actual = [(~rows[:, 0].isnan()).sum() for rows in image_features]
    _check(torch.stack(actual).tolist() if actual else [], [len(rows) // slots * plan for rows in image_features])


def _check(actual: Sequence[int], expected: Sequence[int]) -> None:
    for image, (count, plan) in enumerate(zip(actual, expected, strict=True)):
        if count != plan:
            raise ValueError(
                f"image {image}: expected {quantity(plan, 'image token')} from the plan, got {count}: the tower's "
                "output is not finite, or it is not the one that was patched"
            )


def choose_packed(container: Any, outputs: Any, rankings: Sequence[Ranking], values: Mapping[str, Any]) -> None:
    """Set NaN in the image tokens that are not handed over, among those that the host has packed with newlines.

    Newlines are always kept. The means of groups are of the projected rows.

    Args:
        container: the module that owns tower, projector and language model.
        outputs: the host's outputs, whose `pooler_output` has rows (n,C) for each image.
        rankings: the ranking of all tiles, scores (T,P) and keys (T,P,D), alone in the list.
        values: arguments of the host's `get_image_features`.
    """
    if len(rankings) != 1:
        raise ValueError(f"expected one ranking from the tower, got {len(rankings)}: patch the model anew")
    select: Any = method_of(container)
    scores = pack(container, rankings[0].scores[..., None], values, float("inf"))
    keys = pack(container, rankings[0].keys, values, 0.0)
    handed, actual, expected = [], [], []
    for rows, score, key in zip(outputs.pooler_output, scores, keys, strict=True):
        places = (~score[:, 0].isposinf()).nonzero()[:, 0]
        counts = select.counts(len(places))
        choice = choose_slots(Ranking(score[places, 0][None], key[places][None]), *counts)
        handed.append(rows.index_copy(0, places, choice.apply(rows[places][None])[0]))
        actual.append((~handed[-1][:, 0].isnan()).sum())
        expected.append(len(rows) - len(places) + sum(counts))
    _check(torch.stack(actual).tolist() if actual else [], expected)
    outputs.pooler_output = handed


def pack(container: Any, rows: Tensor, values: Mapping[str, Any], newline: float) -> list[Tensor]:
    """Values (T,P,C) of the patches of all tiles, packed by the host, with this value in newlines: (n,C) per image."""
    sizes = values["image_sizes"]
    tiles = tiles_of(container, sizes, values.get("batch_num_images"))
    options: dict[str, Any] = {
        "vision_feature_select_strategy": _option(container, values, "vision_feature_select_strategy"),
        "vision_aspect_ratio": _option(container, values, "vision_aspect_ratio"),
    }
    names = inspect.signature(container.pack_image_features).parameters
    packed, _ = container.pack_image_features(
        rows.split(tiles),
        sizes,
        image_newline=rows.new_full((rows.shape[2],), newline),
        **{name: value for name, value in options.items() if name in names},
    )
    return list(packed)


def tiles_of(container: Any, image_sizes: Any, batch_num_images: Any = None) -> list[int]:
    """The number of tiles of each image, by the host's function."""
    config, count = container.config, sys.modules[host_of(container).__module__].image_size_to_num_patches  # type: ignore[attr-defined]
    # LLaVA-OneVision divides an image only if it is alone in its text.
    numbers = [1] * len(image_sizes) if batch_num_images is None else batch_num_images
    alone = [int(number) == 1 for number in numbers for _ in range(int(number))]
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if divides else 1
        for size, divides in zip(image_sizes, alone, strict=True)
    ]


def _option(container: Any, values: Mapping[str, Any], name: str) -> Any:
    """An argument of the host's `get_image_features`, or its value in the configuration."""
    value = values.get(name)
    return getattr(container.config, name, None) if value is None else value
