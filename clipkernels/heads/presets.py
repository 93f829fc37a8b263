"""The settings of TCA's reservoir that its released code has for each data set."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Entries per class, temperature of the blocks' weights, λ and β."""

    capacity: int
    temperature: float
    strength: float
    beta: float


PRESETS = {
    "caltech101": Preset(3, 1, 7, 6),
    "dtd": Preset(3, 1, 2, 6),
    "eurosat": Preset(2, 5, 8, 7),
    "fgvc": Preset(3, 0.02, 2, 2),
    "food101": Preset(3, 0.01, 2, 5),
    "imagenet": Preset(3, 0.1, 3, 5),
    "imagenet_a": Preset(3, 0.01, 3, 5),
    "imagenet_r": Preset(3, 0.1, 3, 8),
    "imagenet_sketch": Preset(3, 0.1, 4, 8),
    "imagenet_v2": Preset(3, 0.1, 4, 9),
    "flowers": Preset(3, 0.01, 7, 7),
    "pets": Preset(3, 5.5, 2, 6),
    "cars": Preset(3, 0.1, 1.5, 8),
    "sun397": Preset(3, 0.01, 4, 3),
    "ucf101": Preset(3, 0.01, 6, 8),
}
