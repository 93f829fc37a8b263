"""Published settings of heads per data set, from released code: TCA's, TDA's, Tip-Adapter's, and CALIP's in SuS-X's."""

from __future__ import annotations

from typing import NamedTuple


class ReservoirPreset(NamedTuple):
    """Settings of `ck.Reservoir`: entries per class, temperature of the blocks' weights, λ and β."""

    capacity: int
    temperature: float
    strength: float
    beta: float


RESERVOIR_PRESETS = {
    "caltech101": ReservoirPreset(3, 1, 7, 6),
    "dtd": ReservoirPreset(3, 1, 2, 6),
    "eurosat": ReservoirPreset(2, 5, 8, 7),
    "fgvc": ReservoirPreset(3, 0.02, 2, 2),
    "food101": ReservoirPreset(3, 0.01, 2, 5),
    "imagenet": ReservoirPreset(3, 0.1, 3, 5),
    "imagenet_a": ReservoirPreset(3, 0.01, 3, 5),
    "imagenet_r": ReservoirPreset(3, 0.1, 3, 8),
    "imagenet_sketch": ReservoirPreset(3, 0.1, 4, 8),
    "imagenet_v2": ReservoirPreset(3, 0.1, 4, 9),
    "flowers": ReservoirPreset(3, 0.01, 7, 7),
    "pets": ReservoirPreset(3, 5.5, 2, 6),
    "cars": ReservoirPreset(3, 0.1, 1.5, 8),
    "sun397": ReservoirPreset(3, 0.01, 4, 3),
    "ucf101": ReservoirPreset(3, 0.01, 6, 8),
}


class TDAPreset(NamedTuple):
    """Weight (α) and sharpness (β) of the positive cache of `ck.TDA`."""

    strength: float
    beta: float


TDA_PRESETS = {
    "caltech101": TDAPreset(5, 5),
    "dtd": TDAPreset(2, 3),
    "eurosat": TDAPreset(4, 8),
    "fgvc": TDAPreset(2, 2),
    "food101": TDAPreset(1, 1),
    "imagenet": TDAPreset(2, 5),
    "imagenet_a": TDAPreset(2, 5),
    "imagenet_r": TDAPreset(1, 8),
    "imagenet_sketch": TDAPreset(2.363, 7.45),
    "imagenet_v2": TDAPreset(1, 8),
    "flowers": TDAPreset(1, 5),
    "pets": TDAPreset(2, 7),
    "cars": TDAPreset(1, 7),
    "sun397": TDAPreset(2, 3),
    "ucf101": TDAPreset(3, 8),
}


class CALIPPreset(NamedTuple):
    """CALIP's weights of the attended classes (β₂) and of the attended patches (β₃)."""

    beta2: float
    beta3: float


# Only starting points here, because they are for ResNet-50 with α = 2 and attended features that are normalised again.
CALIP_PRESETS = {
    "caltech101": CALIPPreset(5, 0.18),
    "dtd": CALIPPreset(1.4, 0.01),
    "eurosat": CALIPPreset(6.08, 0.06),
    "fgvc": CALIPPreset(1.3, 0.01),
    "flowers": CALIPPreset(0.5, 0.01),
    "food101": CALIPPreset(0.6, 0.02),
    "imagenet": CALIPPreset(1.12, 0.02),
    "pets": CALIPPreset(0.61, 0.01),
    "cars": CALIPPreset(2.8, 0.01),
    "sun397": CALIPPreset(0.43, 0.01),
    "ucf101": CALIPPreset(1.28, 0.01),
}


class TipPreset(NamedTuple):
    """Tip-Adapter's α and β, with which Tip-Adapter-F also trains, and the ends of the searched grid of β and α."""

    alpha: float
    beta: float
    grid: tuple[float, float]


TIP_PRESETS = {
    "caltech101": TipPreset(3, 1, (12, 5)),
    "dtd": TipPreset(2, 1, (13, 13)),
    "eurosat": TipPreset(2, 1, (12, 10)),
    "fgvc": TipPreset(5, 1, (30, 30)),
    "flowers": TipPreset(10, 1, (50, 50)),
    "food101": TipPreset(1.17, 1, (10, 10)),
    "imagenet": TipPreset(1.17, 1, (7, 3)),
    "pets": TipPreset(1.17, 1, (7, 3)),
    "cars": TipPreset(3, 1, (20, 10)),
    "sun397": TipPreset(1.17, 1, (12, 10)),
    "ucf101": TipPreset(3, 1, (7, 3)),
}
"""configs/*.yaml of the released code of Tip-Adapter."""
