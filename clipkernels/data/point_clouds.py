"""Depth maps of point clouds: pictures that an image tower takes, after PointCLIP (arXiv 2112.02413).

A cloud is moved and scaled to the unit ball, turned for each view, and seen in perspective from a distance d:

    pixel = (row / (z + d), column / (z + d))        value = (z + d) / (d + 1), 0 where there is no point

A point covers the pixels that bilinear interpolation at its place would read, at most four. The nearest point wins.

The released code gives the views, d, the grids, the perspective and far points as the bright ones; so its pictures are
mirrored: what is right-handed looks left-handed. It differs in five places: a point covers the nearest pixel alone; a
pixel is the harmonic mean of all its points, those of the back included, so density changes it; its grid is half a
pixel off centre; it does not divide by d + 1; and it leaves clouds where they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from clipkernels.arguments import check_floating, check_int, check_range, check_tensors, describe, shape_of

# The turns of a view about the first and the second axis, in eighths of a turn.
TURNS = {
    6: ((0, 0), (2, 0), (4, 0), (6, 0), (0, -2), (0, 2)),
    10: ((0, 0), (2, 0), (4, 0), (6, 0), (5, -1), (5, 1), (7, -1), (7, 1), (0, -2), (0, 2)),
}
GRIDS = {6: 128, 10: 224}
DISTANCES = {6: 1.6, 10: 1.4}
FARTHEST = 10_000
"""The largest distance of the camera; there fp32 resolves a thousandth of the radius of a cloud."""


def depth_maps(
    points: Tensor, views: int = 6, size: int = 224, *, grid: int | None = None, distance: float | None = None
) -> Tensor:
    """Pictures (B,V,3,S,S) of point clouds (B,n,3): depth in [0,1], brighter the farther, 0 without a point.

    The second coordinate points up: views 1 to 4 look at the sides, a quarter turn apart, the last two from above and
    from below. Ten views have four more before those two, which look obliquely upwards or downwards. The pictures are
    not normalised for a model; the three channels are equal and share memory.

    Args:
        points: (B,n,3) fp32, fp64, fp16 or bf16, at any place and scale; half precisions are computed in fp32.
        views: V, 6 or 10.
        size: S, the height and width of the pictures in pixels.
        grid: the height and width in pixels of the grid that the points are splatted on, which is then resized
            bilinearly; at most `size`. None is 128 for six views and 224 for ten, or `size` if that is smaller.
        distance: distance of the camera from the centre, above 1 and at most 10⁴. None is 1.6 for six views and 1.4
            for ten.
    Returns:
        (B,V,3,S,S) in the dtype and on the device of the points.
    Raises:
        TypeError: points that are no tensor.
        ValueError: another shape or dtype; clouds that are empty, not finite, or without extent, as of one point; views
            other than 6 and 10; a size, grid or distance outside of its range. The values of the points are read, which
            waits for a GPU, unless in a graph.
    Guarantees: deterministic, except for gradients through the resizing on a GPU; the order of the points does not
        matter but for rounding; a cloud gives the same pictures in any batch. Differentiable in the depths of the
        points that win a pixel; the choice of pixels and points carries no gradient.
    Source: PointCLIP, arXiv 2112.02413, section 3.1, and its released code; this module says what differs.
    """
    _check(points, views, size, grid, distance)
    cells = min(GRIDS[views], size) if grid is None else grid
    away = DISTANCES[views] if distance is None else distance
    cloud = _to_unit_ball(points)[:, None]  # [B, 1, n, 3]
    turns = view_matrices(views).to(cloud)[:, :, None]  # [V, 3, 1, 3]
    # Products of its own instead of a matrix product, which rounds by the batch and, on some GPUs, to TF32.
    row, column, depth = (
        cloud[..., 0] * axis[..., 0] + cloud[..., 1] * axis[..., 1] + cloud[..., 2] * axis[..., 2]
        for axis in turns.unbind(1)
    )
    depth = depth + away  # [B, V, n], from away - 1 to away + 1
    row, column = (axis / depth * (cells / 2) + (cells - 1) / 2 for axis in (row, column))
    pictures = (_nearest(row, column, depth, cells) / (away + 1)).clamp(max=1)
    if cells != size:
        pictures = interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
    return pictures.to(points.dtype)[:, :, None].expand(-1, -1, 3, -1, -1)


def view_matrices(views: int) -> Tensor:
    """The axes (V,3,3) fp64 of the views: unit vectors down the rows, along the columns, and away from the camera."""
    axes = []
    for first, second in TURNS[views]:
        # Rounded so that quarter turns are exact.
        (sa, ca), (sb, cb) = (
            (round(math.sin(turn * math.pi / 4), 15), round(math.cos(turn * math.pi / 4), 15))
            for turn in (first, second)
        )
        axes.append(((0.0, -cb, sb), (ca, -sa * sb, -sa * cb), (sa, ca * sb, ca * cb)))
    return torch.tensor(axes, dtype=torch.float64)


def _to_unit_ball(points: Tensor) -> Tensor:
    """The clouds, their centroids in the origin and their farthest points at radius 1, in fp32 or wider."""
    wide = points.double()
    largest = wide.detach().abs().amax((1, 2), keepdim=True)
    # Divided by a power of two, which is exact, so that neither sums nor squares leave the range of fp64.
    wide = wide / (largest / (2 * largest.frexp().mantissa))
    total = wide
    while total.shape[1] > 1:  # halves are added up, because the order of a reduction may depend on the batch
        half = total.shape[1] // 2
        total = torch.cat([total[:, :half] + total[:, half : 2 * half], total[:, 2 * half :]], 1)
    centred = wide - total / wide.shape[1]
    x, y, z = (centred * centred).unbind(2)
    radius = (x + y + z).amax(1)[:, None, None].sqrt()
    return (centred / radius).to(torch.promote_types(points.dtype, torch.float32))


def _nearest(row: Tensor, column: Tensor, depth: Tensor, grid: int) -> Tensor:
    """The smallest depth of the points (B,V,n) that cover each pixel, (B,V,grid,grid); 0 where there is none."""
    outside = grid * grid
    indices = []
    for step_down in (0, 1):
        for step_right in (0, 1):
            y, x = row.floor() + step_down, column.floor() + step_right
            covered = (y >= 0) & (y < grid) & (x >= 0) & (x < grid)
            # A weight of zero covers nothing: a point on the centre of a row has no second row.
            covered &= ((y - row).abs() < 1) & ((x - column).abs() < 1)
            # As integers, because fp32 does not hold every index of a grid above 4096.
            indices.append(torch.where(covered, y.long() * grid + x.long(), outside))
    index = torch.cat(indices, 2)  # [B, V, 4·n]
    nearest = depth.new_full((*depth.shape[:2], outside + 1), math.inf)
    nearest = nearest.scatter_reduce(2, index, depth.repeat(1, 1, 4), "amin")[..., :outside]
    return torch.where(nearest.isinf(), 0.0, nearest).unflatten(2, (grid, grid))


def _check(points: Any, views: Any, size: Any, grid: Any, distance: Any) -> None:
    check_tensors(points=points)
    if points.ndim != 3 or points.shape[2] != 3:
        raise ValueError(f"points must be (B,n,3), got {shape_of(points)}")
    check_floating(points=points)
    if isinstance(views, bool) or not isinstance(views, int) or views not in TURNS:
        raise ValueError(f"views must be 6 or 10, got {describe(views)}")
    check_int("size", size, 1)
    if grid is not None:
        check_int("grid", grid, 1, size, "size")
    if distance is not None:
        check_range("distance", distance, 1, FARTHEST, "(]")
    if not points.shape[1]:
        raise ValueError(f"points must hold at least two different points of each cloud, got {shape_of(points)}")
    if not points.numel() or points.is_meta or torch.compiler.is_compiling():
        return
    faulty = (~points.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if faulty:
        raise ValueError(f"points must be finite, got NaN or infinity{_place(faulty, points)}: leave such points out")
    flat = (points.amax(1) == points.amin(1)).all(1).nonzero().flatten().tolist()
    if flat:
        raise ValueError(
            f"points must hold at least two different points of each cloud, got all {points.shape[1]} in one place"
            f"{_place(flat, points)}: leave it out"
        )


def _place(clouds: list[int], points: Tensor) -> str:
    """The first of several clouds, in the words of a message; nothing if the batch has no other."""
    return f" in cloud {clouds[0]}" if len(points) > 1 else ""
