"""Depth maps of point clouds: analytic shapes, symmetries, density, gradients and faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

import clipkernels as ck
from clipkernels.data.point_clouds import DISTANCES, _nearest, view_matrices

GRID = 64


def sphere(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A sphere of 2n points on a spiral and opposite to it, (1,2n,3): its centroid is the origin."""
    at = torch.arange(n, dtype=torch.float64) + 0.5
    height, angle = 1 - 2 * at / n, at * math.pi * (1 + math.sqrt(5))
    around = (1 - height * height).sqrt()
    half = torch.stack([around * angle.cos(), height, around * angle.sin()], 1)
    return torch.cat([half, -half])[None].to(dtype)


def cloud(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A lopsided random cloud (1,n,3)."""
    points = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (points * torch.tensor([1.0, 0.6, 0.3]) + points[..., :1] * 0.3).to(dtype)


def radii(grid: int) -> Tensor:
    """The distance (grid,grid) of the pixel centres from the axis, in the plane at depth 1."""
    centres = (2 * torch.arange(grid, dtype=torch.float64) + 1) / grid - 1
    return torch.hypot(centres[:, None], centres)


def sphere_depth(radius: Tensor, distance: float) -> Tensor:
    """The depth of the unit sphere's front along rays, NaN where they miss it."""
    slope = 1 + radius**2
    return (distance - (distance**2 - slope * (distance**2 - 1)).sqrt()) / slope


@pytest.mark.parametrize("views", [6, 10])
def test_a_sphere_is_a_disc_with_the_analytic_depth(views: int) -> None:
    distance = DISTANCES[views]
    pictures = ck.data.depth_maps(sphere(200_000), views, GRID, grid=GRID) * (distance + 1)
    assert pictures.shape == (1, views, 3, GRID, GRID)
    radius, reach = radii(GRID), math.sqrt(2) * 2 / GRID  # a point reaches pixels up to a pixel away on each axis
    edge = 1 / math.sqrt(distance**2 - 1)
    inside, front = radius < edge - reach, sphere_depth(radius, distance)
    nearer = sphere_depth((radius - reach).clamp(min=0), distance)
    for picture in pictures[0].flatten(0, 1):
        assert (picture[radius > edge + reach] == 0).all()
        assert (picture[inside] > 0).all()
        assert (picture[inside] >= nearer[inside] - 1e-9).all()
        assert (picture[inside] <= front[inside] + 0.01).all()


def test_the_value_is_depth_over_the_largest_depth() -> None:
    # Two points on the axis of the first view, at z = -1 and 1: the nearer one wins, at depth 0.6 of 2.6.
    points = torch.tensor([[[0.0, 0, -1], [0, 0, 1]]])
    pictures = ck.data.depth_maps(points, 6, 8)[0, :, 0]
    middle = torch.zeros(8, 8)
    middle[3:5, 3:5] = 0.6 / 2.6
    torch.testing.assert_close(pictures[0], middle)
    torch.testing.assert_close(pictures[2], middle)
    # From the side both are at depth 1.6, at x/z = ±0.625, 6 and 1 in pixels: between their columns, nothing.
    side = torch.zeros(8, 8)
    side[3:5, 1] = side[3:5, 6] = 1.6 / 2.6
    torch.testing.assert_close(pictures[1], side)


@pytest.mark.parametrize("views", [6, 10])
def test_the_views_are_those_of_the_released_code(views: int) -> None:
    # Euler angles in eighths of a turn; the rotation is Rx @ Ry @ Rz.
    around = [(0, 0, 2), (2, 0, 2), (4, 0, 2), (6, 0, 2)]
    oblique = [(5, -1, 2), (5, 1, 2), (7, -1, 2), (7, 1, 2)] if views == 10 else []
    for angles, axes in zip([*around, *oblique, (0, -2, 2), (0, 2, 2)], view_matrices(views), strict=True):
        rotation = torch.eye(3, dtype=torch.float64)
        for axis, eighths in enumerate(angles):
            one, two = [(1, 2), (2, 0), (0, 1)][axis]
            turn, angle = torch.eye(3, dtype=torch.float64), eighths * math.pi / 4
            turn[one, one] = turn[two, two] = math.cos(angle)
            turn[two, one] = math.sin(angle)
            turn[one, two] = -math.sin(angle)
            rotation = rotation @ turn
        torch.testing.assert_close(axes, rotation)


def test_up_is_up_and_the_last_views_are_from_above_and_below() -> None:
    axes = view_matrices(6)
    up = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    assert (axes[:4, 0] @ up).tolist() == [-1.0] * 4 and (axes[:4, 2] @ up).tolist() == [0.0] * 4
    assert (axes[4:, 2] @ up).tolist() == [-1.0, 1.0]
    ten = view_matrices(10)
    assert torch.equal(ten[[0, 1, 2, 3, 8, 9]], axes)
    torch.testing.assert_close(ten @ ten.mT, torch.eye(3, dtype=torch.float64).expand(10, 3, 3))
    torch.testing.assert_close(torch.linalg.det(ten), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(ten[4:8, 2] @ up, torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64))
    # No two views look along one direction.
    assert ((ten[:, 2] @ ten[:, 2].T) - 2 * torch.eye(10, dtype=torch.float64) < 0.9).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_permutes_the_views(axis: int) -> None:
    points = cloud(500)
    one, two = [other for other in range(3) if other != axis]
    turned = points.clone()
    turned[..., one], turned[..., two] = -points[..., two], points[..., one]
    before, after = (ck.data.depth_maps(each, 6, GRID, grid=GRID)[0, :, 0] for each in (points, turned))
    matches = [
        [view for view in range(6) if any(torch.equal(torch.rot90(before[view], k), picture) for k in range(4))]
        for picture in after
    ]
    assert sorted(matches) == [[view] for view in range(6)]
    kept = sum(views == [place] for place, views in enumerate(matches))
    assert kept == 2  # the views along the axis


def test_density_does_not_change_the_picture() -> None:
    def surface(n: int, seed: int) -> Tensor:
        """An ellipsoid with a lid that is flat."""
        points = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        points = points / points.norm(dim=2, keepdim=True) * torch.tensor([1.0, 0.7, 0.5])
        return torch.cat([points[..., :1], points[..., 1:2].clamp(max=0.4), points[..., 2:]], 2)

    sparse, dense = (
        ck.data.depth_maps(surface(n, seed), 6, GRID, grid=GRID)[0, :, 0] for n, seed in ((40_000, 1), (400_000, 2))
    )
    difference = (sparse - dense).abs()
    inner = -max_pool2d(-(dense > 0).double(), 5, 1, 2) > 0  # two pixels from the outline
    assert inner.double().mean() > 0.15
    assert difference[inner].mean() < 0.002 and difference[inner].max() < 0.02
    assert ((sparse > 0) != (dense > 0)).double().mean() < 0.005


def test_place_and_scale_do_not_matter() -> None:
    points = cloud(300)
    expected = ck.data.depth_maps(points, 10, 32)
    assert torch.equal(ck.data.depth_maps(points * 2.0**20, 10, 32), expected)
    largest = points / points.abs().max() * 1.7e308  # its extent and its sums are above the range of fp64
    for other in (points * 1e-30, points * 1e200, largest, points * 3 + torch.tensor([5.0, -7.0, 2.0])):
        torch.testing.assert_close(ck.data.depth_maps(other, 10, 32), expected)
    smallest = torch.tensor([[[0.0, 0, 0], [0, 0, 1]]], dtype=torch.float64)
    assert torch.equal(ck.data.depth_maps(smallest * 5e-324, 6, 8), ck.data.depth_maps(smallest, 6, 8))


def test_a_batch_equals_its_items() -> None:
    for dtype in (torch.float32, torch.float64):
        points = torch.cat([cloud(257, seed, dtype) for seed in range(5)])
        batch = ck.data.depth_maps(points, 6, 48, grid=32)
        alone = torch.cat([ck.data.depth_maps(each[None], 6, 48, grid=32) for each in points])
        assert torch.equal(batch, alone)
        assert torch.equal(ck.data.depth_maps(points.mT.contiguous().mT, 6, 48, grid=32), batch)
    assert ck.data.depth_maps(points[:0], 10, 8).shape == (0, 10, 3, 8, 8)


def test_the_order_of_the_points_does_not_matter() -> None:
    points = cloud(400)
    shuffled = points[:, torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(ck.data.depth_maps(shuffled, 6, 40), ck.data.depth_maps(points, 6, 40))


def test_values_are_depths_from_0_to_1_in_three_channels() -> None:
    for views, size in ((6, 224), (10, 32)):
        pictures = ck.data.depth_maps(cloud(300, dtype=torch.float32), views, size)
        assert pictures.dtype == torch.float32 and pictures.shape == (1, views, 3, size, size)
        assert float(pictures.min()) == 0 and 0.5 < float(pictures.max()) <= 1
        assert torch.equal(pictures[:, :, 0], pictures[:, :, 1]) and torch.equal(pictures[:, :, 0], pictures[:, :, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    points = cloud(300, dtype=dtype)
    expected = ck.data.depth_maps(points.float(), 6, 32).to(dtype)
    assert torch.equal(ck.data.depth_maps(points, 6, 32), expected)


def test_a_point_on_a_pixel_covers_it_alone() -> None:
    # Of five cells the middle one has its centre on the axis: the point in the origin covers no second one.
    points = torch.tensor([[[0.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0]]])
    picture = ck.data.depth_maps(points, 6, 5)[0, 0, 0]
    assert (picture[:, 2] > 0).sum() == 5 and (picture[:, [0, 1, 3, 4]] == 0).all()


def test_single_precision_holds_every_pixel_of_a_large_grid() -> None:
    grid = 4999  # fp32 does not hold every index above 2²⁴
    row, column, depth = torch.tensor([4000.5, 4998.0]), torch.tensor([4997.5, 17.25]), torch.tensor([1.0, 2.0])
    picture = _nearest(row[None, None], column[None, None], depth[None, None], grid)[0, 0]
    pixels = [[4000, 4997], [4000, 4998], [4001, 4997], [4001, 4998], [4998, 17], [4998, 18]]
    assert picture.nonzero().tolist() == pixels
    assert picture[tuple(torch.tensor(pixels).T)].tolist() == [1.0] * 4 + [2.0] * 2


def test_nearer_points_hide_those_behind() -> None:
    plate = torch.stack(torch.meshgrid(*[torch.linspace(-0.5, 0.5, 60)] * 2, indexing="ij"), 2).flatten(0, 1)
    near, far = torch.nn.functional.pad(plate, (0, 1), value=-0.5), torch.nn.functional.pad(plate, (0, 1), value=0.5)
    points = torch.cat([near, far])[None]
    radius = math.sqrt(0.75)
    picture = ck.data.depth_maps(points, 6, 32)[0, 0, 0]
    expected = (1.6 - 0.5 / radius) / 2.6
    assert picture.unique().tolist() == pytest.approx([0, expected], abs=1e-6)
    back = ck.data.depth_maps(far[None].repeat(1, 2, 1) * torch.tensor([1, 1, 1.0]), 6, 32)[0, 0, 0]
    assert float(back.max()) == pytest.approx(1.6 / 2.6, abs=1e-6)  # alone, the plate is the centre


@pytest.mark.parametrize(("views", "grid"), [(6, 128), (10, 224)])
def test_the_grid_of_the_released_code_is_resized_bilinearly(views: int, grid: int) -> None:
    points = cloud(300)
    small = ck.data.depth_maps(points, views, grid, grid=grid)[0, :, :1]
    expected = small if grid == 224 else interpolate(small, scale_factor=224 / grid, mode="bilinear")
    assert torch.equal(ck.data.depth_maps(points, views)[0, :, :1], expected)


def test_pictures_are_on_the_device_of_the_points() -> None:
    points = torch.empty(2, 9, 3, device="meta", dtype=torch.bfloat16)
    pictures = ck.data.depth_maps(points, 10, 8)
    assert (pictures.device.type, pictures.dtype, pictures.shape) == ("meta", torch.bfloat16, (2, 10, 3, 8, 8))


def test_gradients_are_those_of_the_depths() -> None:
    points = cloud(40).requires_grad_()
    weights = torch.randn(6, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def total(points: Tensor) -> Tensor:
        return (ck.data.depth_maps(points, 6, 24, grid=16)[0, :, 0] * weights).sum()

    assert torch.autograd.gradcheck(total, (points,), eps=1e-7, atol=1e-5)


def test_they_compile_in_one_graph() -> None:
    points = cloud(64, dtype=torch.float32)
    compiled = torch.compile(ck.data.depth_maps, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(points, 6, 32), ck.data.depth_maps(points, 6, 32))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 0, 3), r"at least two different points of each cloud, got \(2,0,3\)"),
        (torch.ones(1, 1, 3), "got all 1 in one place: leave it out"),
        (torch.cat([torch.rand(1, 9, 3), torch.full((1, 9, 3), 0.1)]), "got all 9 in one place in cloud 1"),
        (torch.full((1, 4, 3), math.nan), "must be finite, got NaN or infinity: leave such points out"),
        (
            torch.cat([torch.rand(1, 1, 3), torch.full((1, 1, 3), math.inf)]).repeat(1, 2, 1),
            "NaN or infinity in cloud 1",
        ),
        (torch.rand(4, 3), r"points must be \(B,n,3\), got \(4,3\)"),
        (torch.rand(1, 4, 4), r"points must be \(B,n,3\), got \(1,4,4\)"),
        (torch.ones(1, 4, 3).long(), "points must be float32, float16, bfloat16 or float64, got torch.int64"),
        (torch.rand(1, 4, 3).to(torch.float8_e5m2), "bfloat16 or float64, got torch.float8_e5m2"),
    ],
)
def test_faulty_clouds_are_refused(points: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ck.data.depth_maps(points)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 5}, "views must be 6 or 10, got 5"),
        ({"views": True}, "views must be 6 or 10, got True"),
        ({"views": 6.0}, "views must be 6 or 10, got 6.0"),
        ({"size": 0}, "size must be an int of at least 1, got 0"),
        ({"size": 32, "grid": 33}, "grid must be an int from 1 to size = 32, got 33"),
        ({"distance": 1.0}, r"distance must be a number in \(1, 10000\], got 1\.0"),
        ({"distance": math.nan}, r"distance must be a number in \(1, 10000\], got nan"),
        ({"distance": 1e30}, r"distance must be a number in \(1, 10000\], got 1e\+30"),
    ],
)
def test_faulty_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.data.depth_maps(torch.rand(1, 4, 3), **options)
    with pytest.raises(TypeError, match=r"points must be a torch\.Tensor, got list"):
        ck.data.depth_maps([[0.0, 0, 0]])  # type: ignore[arg-type]
