"""The published settings of heads for each data set: TCA's by its released code, CALIP's by that of SuS-X."""

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


class Betas(NamedTuple):
    """CALIP's weights of the classes that looked at the patches, and of the patches that looked at the classes."""

    beta2: float
    beta3: float


# For ResNet-50, with α = 2 and what is attended normalised again: places to start from.
CALIP_PRESETS = {
    "caltech101": Betas(5, 0.18),
    "dtd": Betas(1.4, 0.01),
    "eurosat": Betas(6.08, 0.06),
    "fgvc": Betas(1.3, 0.01),
    "flowers": Betas(0.5, 0.01),
    "food101": Betas(0.6, 0.02),
    "imagenet": Betas(1.12, 0.02),
    "pets": Betas(0.61, 0.01),
    "cars": Betas(2.8, 0.01),
    "sun397": Betas(0.43, 0.01),
    "ucf101": Betas(1.28, 0.01),
}
