"""`ck.show`: the patches that a picture shows are those that `encode_image(source=True)` reports."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.pictures import files
from clipkernels.pictures.panel import BLANK, CROSS, HATCH, OUTLINES, Geometry, colour, draw_panel
from clipkernels.pictures.patches import Patches, choose_blocks, describe_blocks, patches_by_block
from clipkernels.pictures.sheet import Layout
from clipkernels.plan import Plan
from clipkernels.testing import patch_ranking, patched_with, randomized, timm_tower, transformers_tower

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"embed_dim": 64, "num_heads": 2, "num_classes": 24}
SIGLIP = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
# Towers by what is special about their tokens.
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "CLS": lambda: ck.bundled()[0],
    "no prefix": lambda: timm_tower("vit_base_patch16_siglip_224", 3, img_size=64, **SMALL),
    "registers": lambda: timm_tower("vit_base_patch14_reg4_dinov2", 3, img_size=56, **SMALL),
    "not square": lambda: timm_tower("vit_base_patch16_clip_224", 3, img_size=(48, 80), **SMALL),
    "transformers": lambda: transformers_tower("SiglipModel", 3, **SIGLIP),
}
METHODS = [ck.ToMe(2), ck.EViT(0.6), ck.EViT(0.6, fuse=False), ck.TCA(0.25, blocks=(1,)), patch_ranking]


def preprocess(image: Image.Image) -> Tensor:
    """An image of the tower's size as it is, with the mean and the deviation of no known model."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.4) / 0.3


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def read_back(picture: Image.Image) -> np.ndarray:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return np.array(Image.open(file))


def build(name: str) -> nn.Module:
    pytest.importorskip("transformers" if name == "transformers" else "timm", reason="the library is not installed")
    return TOWERS[name]() if name == "CLS" else randomized(TOWERS[name]())


def kept_in_source(source: list[list[int]], plan: Plan) -> list[list[bool]]:
    """For each step, true for a patch with a row to itself that is not, and never was, in a fused token."""
    counts = [after for step, (_, after) in zip(plan.steps, plan.passes, strict=True) if step]
    fuses = [isinstance(step, ck.Condense) or getattr(step, "fuse", False) for step in plan.steps if step]
    fused, kept = [False] * len(source[0]), []
    for rows, count, fuse in zip(source, counts, fuses, strict=True):
        fused = [before or (fuse and row == count - 1) for before, row in zip(fused, rows, strict=True)]
        kept.append([row >= 0 and rows.count(row) == 1 and not f for row, f in zip(rows, fused, strict=True)])
    return kept


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_kept_patches_are_the_images_pixels_and_no_others_are(name: str) -> None:
    model = build(name)
    tower = ck.tower_of(model)
    height, width = tower.image_size
    pixels = noise(height, width)
    methods = [method(model) if callable(method) else method for method in METHODS]
    named = {f"{place}": method for place, method in enumerate(methods)}
    picture = read_back(ck.show(model, Image.fromarray(pixels), named, preprocess=preprocess, all_steps=True))
    geometry = Geometry.of(height, width, tower.patch)
    layout, side = Layout(*geometry.size), geometry.cell
    large = pixels.repeat(geometry.scale, 0).repeat(geometry.scale, 1)
    plans = [method.plan(tower.num_tokens, len(tower.blocks), tower.prefix) for method in methods]
    blocks = choose_blocks(plans, all_steps=True)
    for row, (method, plan) in enumerate(zip(methods, plans, strict=True)):
        image = preprocess(Image.fromarray(pixels))[None]
        with ck.patched(model, method):
            source = ck.encode_image(model, image, source=True).source
        assert source is not None
        steps = [block for block, step in enumerate(plan.steps) if step is not None]
        shown = 0
        for block, kept in zip(steps, kept_in_source(source[0].tolist(), plan), strict=True):
            x, y = layout.at(row, 1 + blocks.index(block))
            for patch, alone in enumerate(kept):
                top, left = patch // geometry.columns * side, patch % geometry.columns * side
                expected = large[top : top + side, left : left + side]
                actual = picture[y + top : y + top + side, x + left : x + left + side]
                assert np.array_equal(actual, expected) == alone
                shown += alone
        assert 0 < shown < len(steps) * len(kept)


def test_the_image_is_whole_before_the_steps_and_without_any(tiny: nn.Module) -> None:
    pixels = noise(32, 32)
    methods = [ck.Dense(), ck.ToMe(8)]
    picture = read_back(ck.show(tiny, Image.fromarray(pixels), methods, preprocess=preprocess))
    layout = Layout(224, 224)
    for row in (0, 1):
        x, y = layout.at(row, 0)
        assert np.array_equal(picture[y : y + 224, x : x + 224], pixels.repeat(7, 0).repeat(7, 1))
    x, y = layout.at(0, 1)
    assert (picture[y : y + 224, x : x + 224] == 255).all()


def draw(rows: list[list[int]], fused: list[list[bool]] | None = None, patch: int = 20) -> tuple[np.ndarray, Any]:
    """A panel of noise, at the size of the image, and the colours of its patches."""
    grid = np.array(rows)
    pixels = noise(grid.shape[0] * patch, grid.shape[1] * patch)
    flags = np.zeros(grid.size, bool) if fused is None else np.array(fused).ravel()
    patches, geometry = Patches(grid.ravel(), flags, 9), Geometry(*grid.shape, patch, 1)
    colouring = colour(pixels, patches, geometry)
    return draw_panel(pixels, patches, colouring, geometry), (pixels, colouring)


def test_a_merged_token_has_its_mean_colour_wherever_its_patches_lie() -> None:
    panel, (pixels, _) = draw([[1, 1, 2], [3, 4, 5], [6, 7, 1]])
    members = [pixels[:20, :20], pixels[:20, 20:40], pixels[40:, 40:]]
    mean = np.rint(np.mean([member.reshape(-1, 3).mean(0) for member in members], 0))
    assert (panel[10, 10] == mean).all() and (panel[10, 30] == mean).all() and (panel[50, 50] == mean).all()
    assert (panel[10, 20] == mean).all()  # no line within a group


def test_an_outline_follows_the_borders_of_a_group_and_its_corners() -> None:
    panel, (_, colouring) = draw([[1, 2, 3], [1, 1, 4], [5, 6, 7]])
    line = OUTLINES[colouring.outlines[0]]
    for y, x in ((0, 10), (10, 0), (39, 10), (39, 30), (20, 30), (30, 39), (10, 19), (21, 18), (20, 19)):
        assert (panel[y, x] == line).all(), (y, x)
    inside = panel[30, 10]
    assert (panel[20, 10] == inside).all() and (panel[30, 20] == inside).all() and not (inside == line).all()


def test_an_outline_is_closed_where_a_fused_patch_joined_the_group() -> None:
    panel, (_, colouring) = draw([[1, 1, 1]], [[False, False, True]])
    assert (panel[10, 39] == OUTLINES[colouring.outlines[0]]).all() and (panel[10, 20] == panel[10, 10]).all()


def test_neighbours_have_different_outlines_and_parts_the_same() -> None:
    _, (_, colouring) = draw([[1, 1, 2, 2], [3, 3, 4, 4], [2, 5, 5, 1]])
    outlines = colouring.outlines.reshape(3, 4)
    assert outlines[0, 0] == outlines[0, 1] == outlines[2, 3] and outlines[0, 2] == outlines[2, 0]
    assert outlines[0, 0] != outlines[0, 2] != outlines[1, 2] != outlines[1, 0] != outlines[0, 0]
    assert len({outlines[0, 0], outlines[0, 2], outlines[1, 0]}) == 3


def test_a_token_keeps_its_outline_in_the_next_panel() -> None:
    pixels, geometry = noise(20, 80), Geometry(1, 4, 20, 1)
    states = [Patches(np.array(rows), np.zeros(4, bool), 9) for rows in ([1, 2, 3, 3], [1, 1, 2, 2])]
    first = colour(pixels, states[0], geometry)
    second = colour(pixels, states[1], geometry, first.outlines)
    assert (first.outlines[:2] == -1).all() and (second.outlines[2:] == first.outlines[2:]).all()
    assert second.outlines[0] != second.outlines[2]


def test_fused_patches_are_hatched_and_dropped_ones_blank() -> None:
    panel, _ = draw([[1, 2, 2], [-1, 2, -1]], [[False, True, True], [False, True, False]])
    for top, left, colours in ((0, 20, HATCH), (0, 40, HATCH), (20, 20, HATCH), (20, 0, (BLANK, CROSS))):
        cell = panel[top : top + 20, left : left + 20].reshape(-1, 3)
        assert {tuple(pixel) for pixel in cell.tolist()} == set(colours)


def test_a_fused_patch_stays_fused_if_its_token_is_kept_or_merged() -> None:
    plan = Plan((ck.Prune(2), None, ck.Prune(2), ck.Merge(1)), 6)
    source = np.array([[1, 3, 2, 3, 3], [1, 2, 3, 2, 2], [1, 2, 1, 2, 2]])
    first, same, second, last = patches_by_block(source, plan)
    assert first is same and (first.tokens, second.tokens, last.tokens) == (4, 4, 3)
    assert first.fused.tolist() == [False, True, False, True, True]
    assert second.fused.tolist() == [False, True, True, True, True]
    assert last.fused.tolist() == second.fused.tolist() and last.merged.tolist() == [True] + 4 * [False]
    assert (first.describe(), second.describe()) == ("2 kept, 3 fused", "1 kept, 4 fused")


def test_dropped_patches_stay_dropped_and_are_counted() -> None:
    patches = Patches(np.array([1, -1, 2, 2, 3, -1, 3]), np.zeros(7, bool), 4)
    assert patches.sizes.tolist() == [1, 0, 2, 2, 2, 0, 2]
    assert patches.describe() == "1 kept, 4 merged into 2, 2 dropped"


@pytest.mark.parametrize(
    ("methods", "depth", "all_steps", "blocks"),
    [
        ([ck.ToMe(8)], 12, False, [2, 5, 8, 11]),
        ([ck.ToMe(8)], 12, True, list(range(12))),
        ([ck.ToMe(8), ck.EViT(0.7)], 12, False, [3, 6, 9, 11]),
        ([ck.EViT(0.7), ck.TCA(0.1)], 12, False, [3, 6, 9]),
        ([ck.EViT(0.7, blocks=(1,)), ck.EViT(0.7, blocks=(5,))], 12, False, [1, 5]),
        ([ck.Dense()], 12, True, []),
    ],
)
def test_the_blocks_that_are_shown(methods: Any, depth: int, all_steps: bool, blocks: list[int]) -> None:
    assert choose_blocks([method.plan(197, depth) for method in methods], all_steps) == blocks


def test_the_blocks_of_a_plan_in_words() -> None:
    words = [describe_blocks(method.plan(197, 12)) for method in (ck.Dense(), ck.ToMe(8), ck.EViT(0.7))]
    assert words == ["no step in any block", "a step in each of blocks 0 to 11", "3 steps, in blocks 3, 6, 9"]
    assert describe_blocks(ck.EViT(0.7, blocks=(3,)).plan(197, 12)) == "1 step, in block 3"


@pytest.mark.parametrize(("size", "patch", "scale"), [(224, 16, 1), (336, 14, 1), (32, 4, 7), (64, 16, 4), (224, 8, 2)])
def test_panels_are_of_moderate_size(size: int, patch: int, scale: int) -> None:
    assert Geometry.of(size, size, patch) == (size // patch, size // patch, patch, scale)


def scene_images(count: int) -> list[Image.Image]:
    return [Image.fromarray(image) for image in scenes.draw(count, 5).images]


@torch.no_grad()
def test_the_worst_images_come_first(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipkernels.pictures import show as module

    methods = [ck.ToMe(8), ck.EViT(0.5)]
    images = scene_images(9)
    batch = torch.stack([preprocess(image) for image in images])
    dense = tiny.encode_image(batch)  # type: ignore[operator]
    cosines = []
    for method in methods:
        with ck.patched(tiny, method):
            cosines.append(torch.cosine_similarity(tiny.encode_image(batch), dense))  # type: ignore[operator]
    order = torch.stack(cosines).amin(0).argsort().tolist()
    moved = []

    def record(*arguments: Any) -> Any:
        moved.append(arguments[2])
        return draw_moves(*arguments)

    draw_moves = module.draw_moves
    monkeypatch.setattr(module, "draw_moves", record)
    ck.show(tiny, images, methods, preprocess=preprocess, worst=4)
    assert moved[0].indices == order[:4]
    expected = torch.stack(cosines, 1)[order[:4]]
    torch.testing.assert_close(torch.from_numpy(moved[0].cosines).float(), expected, atol=1e-5, rtol=0)


def test_an_embedding_that_is_not_finite_is_the_worst(tiny: nn.Module) -> None:
    from clipkernels.images.batches import Loaded
    from clipkernels.pictures.moves import measure_moves

    images = torch.stack([preprocess(image) for image in scene_images(3)])
    images[1] = torch.nan
    moves = measure_moves(tiny, [Loaded([0, 1, 2], images, [])], {"": ck.ToMe(8)})
    assert moves.cosines[1] == 0 and moves.worst(1).indices == [1]


@torch.no_grad()
def test_several_images_share_a_row_with_what_is_left_at_the_end(tiny: nn.Module) -> None:
    images = scene_images(4)
    picture = read_back(ck.show(tiny, images, ck.EViT(0.5), preprocess=preprocess))
    layout = Layout(224, 224, titled=False)
    with ck.patched(tiny, ck.EViT(0.5)):
        source = ck.encode_image(tiny, torch.stack([preprocess(image) for image in images]), source=True).source
    assert source is not None
    for place, image in enumerate(images):
        whole = np.array(image).repeat(7, 0).repeat(7, 1)
        (x, y), (right, _) = (layout.at(place // 3, 2 * (place % 3) + column) for column in (0, 1))
        assert np.array_equal(picture[y : y + 224, x : x + 224], whole)
        cells = (picture[y : y + 224, right : right + 224] == whole).reshape(8, 28, 8, 28, 3).all((1, 3, 4)).ravel()
        assert cells.sum() == kept_in_source(source[place].tolist(), ck.EViT(0.5).plan(65, 6))[-1].count(True)


def test_a_model_stays_patched_as_it_was(tiny: nn.Module, images: Tensor) -> None:
    ck.patch(tiny, ck.EViT(0.5))
    before = tiny.encode_image(images)  # type: ignore[operator]
    ck.show(tiny, scene_images(1), [ck.ToMe(8)], preprocess=preprocess)
    assert ck.method_of(tiny) == ck.EViT(0.5)
    assert torch.equal(tiny.encode_image(images), before)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"in \[0, 5\]"):
        ck.show(tiny, scene_images(1), [ck.EViT(0.5, blocks=(9,))], preprocess=preprocess)
    assert ck.method_of(tiny) == ck.EViT(0.5)


def test_paths_images_and_tensors_give_the_same_picture(tiny: nn.Module, tmp_path: Path) -> None:
    [image] = scene_images(1)
    image.save(tmp_path / "scene.png")
    pictures = [
        ck.show(tiny, item, ck.ToMe(8), preprocess=preprocess, names=["scene"])
        for item in (image, preprocess(image), [tmp_path / "scene.png"], str(tmp_path / "scene.png"))
    ]
    assert all(np.array_equal(np.array(picture), np.array(pictures[0])) for picture in pictures)


def test_a_half_precision_tower_is_shown(tiny: nn.Module) -> None:
    ck.show(patched_with(tiny.to(torch.bfloat16), ck.ToMe(4)), scene_images(1), ck.TCA(0.1), preprocess=preprocess)


@pytest.mark.parametrize(
    ("images", "methods", "options", "message"),
    [
        ([], ck.ToMe(8), {}, "at least one image, got none"),
        (scene_images(1), [], {}, "at least one method such as ck.ToMe"),
        (scene_images(1) * 17, ck.ToMe(8), {}, "expected at most 16 images, got 17: show the worst 16"),
        (scene_images(1), ck.ToMe(8), {"worst": 0}, "worst must be"),
        (scene_images(1), ck.ToMe(8), {"names": []}, "one per image, 1 here, got 0"),
        (["nothing.png"], ck.ToMe(8), {}, "got nothing.png: No such file"),
        ([torch.zeros(3, 16, 16)], ck.ToMe(8), {}, "got one: a tensor"),
    ],
)
def test_images_that_cannot_be_shown_are_refused(
    tiny: nn.Module, images: Any, methods: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ck.show(tiny, images, methods, preprocess=preprocess, **options)


def test_letters_need_no_freetype(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = ImageFont.load_default_imagefont() if hasattr(ImageFont, "load_default_imagefont") else None
    if bitmap is None:
        pytest.skip("this Pillow has no bitmap font of its own name")

    def load_default(size: float | None = None) -> Any:
        if size is not None:
            raise ImportError("no FreeType")
        return bitmap

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    assert files.fit("ünï→ 123456789", files.font_of(13), 40).startswith("...")
    ck.show(tiny, scene_images(1), ck.ToMe(8), preprocess=preprocess, names=["→.png"])


def test_a_picture_that_is_too_large_for_its_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 16383 pixels for WEBP, got 2 x 16384: write a \.png"):
        files.save_picture(Image.new("RGB", (2, 16384)), tmp_path / "long.webp")
    files.save_picture(Image.new("RGB", (2, 16384)), tmp_path / "long.png")
    assert [path.name for path in tmp_path.iterdir()] == ["long.png"]
