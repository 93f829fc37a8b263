"""Handwritten digits pasted at a random position, size and tilt on textured backgrounds, 32×32 RGB.

The 1,797 digits are the Optical Recognition of Handwritten Digits test set (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, CC BY 4.0) as scikit-learn ships it: 8×8 pixels, 0 to 16. The first half is for training and
the second half is held out, as in scikit-learn's example, so the writers differ.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from clipkernels.arguments import check_flags, check_int
from clipkernels.data.scenes import SIDE, Images, texture

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ('a photo of the number: "{}".', "the handwritten digit {}.", "a picture of the digit {}.", "{}.")
TRAINING = 898


def load(held_out: bool) -> Images:
    """The original digits, (898 or 899, 8, 8) uint8 from 0 to 16, and their values."""
    with files("clipkernels.data").joinpath("digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images, labels = archive["images"], archive["labels"].astype(np.int64)
    half = slice(TRAINING, None) if held_out else slice(TRAINING)
    return Images(images[half], labels[half])


def draw(n: int, seed: int, held_out: bool = True) -> Images:
    """n digits pasted on backgrounds, each source digit equally often; equal arguments give equal images.

    Args:
        n: number of images.
        seed: non-negative.
        held_out: use the held-out half of the writers instead of the training half.
    Returns:
        Images, with labels into CLASSES.
    Raises:
        ValueError: numbers that are no ints or negative.
    """
    check_int("n", n, 0)
    check_int("seed", seed, 0)
    check_flags(held_out=held_out)
    source = load(held_out)
    rng = np.random.default_rng([seed, 2, held_out])
    repeats = -(-n // len(source.labels))
    rows = np.concatenate([rng.permutation(len(source.labels)) for _ in range(repeats)])[:n]
    canvas = texture(rng, n)
    alpha = _paste(rng, source.images[rows].astype(np.float32) / 16)
    ground = canvas.mean((1, 2, 3), keepdims=True)
    lighter = np.where(ground < 0.35, True, np.where(ground > 0.65, False, rng.random(ground.shape) < 0.5))
    contrast = rng.uniform(0.35, 0.6, ground.shape)
    ink = np.where(lighter, ground + contrast, ground - contrast) + rng.uniform(-0.08, 0.08, (n, 1, 1, 3))
    canvas = canvas * (1 - alpha) + ink * alpha + rng.normal(0, 0.02, canvas.shape)
    return Images((np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), source.labels[rows])


def _paste(rng: np.random.Generator, glyphs: np.ndarray) -> np.ndarray:
    """The ink coverage (n,32,32,1) of glyphs (n,8,8): 18 to 30 pixels high, stretched, tilted up to 14 degrees."""
    n = len(glyphs)
    size, tilt = rng.uniform(18, 30, n) / SIDE, rng.uniform(-0.25, 0.25, n)
    width = size * rng.uniform(0.8, 1.1, n)
    shift = rng.uniform(-1, 1, (2, n)) * (1 - size)
    cos, sin = np.cos(tilt), np.sin(tilt)
    across = np.stack([cos, sin, -cos * shift[0] - sin * shift[1]], axis=1) / width[:, None]
    down = np.stack([-sin, cos, sin * shift[0] - cos * shift[1]], axis=1) / size[:, None]
    theta = np.stack([across, down], axis=1)
    grid = affine_grid(torch.from_numpy(theta.astype(np.float32)), [n, 1, SIDE, SIDE], align_corners=False)
    alpha = grid_sample(torch.from_numpy(glyphs)[:, None], grid, mode="bicubic", align_corners=False)
    return np.clip(alpha[:, 0, :, :, None].numpy() * 1.25, 0, 1)
