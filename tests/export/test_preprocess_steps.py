"""Preprocessing as data: the host's pixels from steps that run without torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import transforms

from clipkernels.artefacts.transformers import run_processor
from clipkernels.data import scenes
from clipkernels.exporting.preprocess_steps import grey_levels, preprocess_record
from clipkernels.runtime.preprocessing import preprocess as run_steps
from clipkernels.runtime.tensor_resize import resize_tensor
from tests.local_transformers import image_processor

OPEN_CLIP: list[dict[str, Any]] = [
    {"image_size": 224},
    {"image_size": (48, 64)},
    {"image_size": 64, "resize_mode": "squash", "interpolation": "bilinear"},
    {"image_size": 64, "resize_mode": "longest", "fill_color": 127},
    {"image_size": (64, 32), "resize_mode": "longest", "mean": 0.5, "std": 0.25},
]
TIMM: list[dict[str, Any]] = [
    {"input_size": (3, 224, 224), "crop_pct": 0.9},
    {"input_size": (3, 64, 64), "crop_mode": "border", "crop_pct": 0.875},
    {"input_size": (3, 64, 48), "crop_mode": "squash", "interpolation": "bicubic"},
    {"input_size": (3, 64, 48)},
]


def pictures() -> list[Image.Image]:
    """Drawn scenes, enlarged to smooth pictures of several proportions, one of them tall."""
    drawn, sizes = scenes.draw(3, seed=0).images, ((400, 300), (333, 517), (250, 900))
    return [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x, size in zip(drawn, sizes, strict=True)]


@pytest.mark.parametrize("options", OPEN_CLIP, ids=str)
def test_steps_of_open_clip_give_its_pixels_bit_for_bit(options: dict[str, Any]) -> None:
    transform = image_transform(is_train=False, **options)
    steps = preprocess_record(transform)["steps"]
    assert grey_levels(steps, transform) == 0
    for picture in pictures():
        assert np.array_equal(run_steps(picture, steps), transform(picture).numpy())


@pytest.mark.parametrize("options", TIMM, ids=str)
def test_steps_of_timm_give_its_pixels_bit_for_bit(options: dict[str, Any]) -> None:
    create_transform = pytest.importorskip("timm", reason="timm is not installed").data.create_transform
    transform = create_transform(is_training=False, **options)
    steps = preprocess_record(transform)["steps"]
    assert grey_levels(steps, transform) == 0


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "SiglipImageProcessor", "CLIPImageProcessorPil"])
def test_steps_of_transformers_are_within_one_grey_level(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    processor = getattr(transformers, name)()
    steps = preprocess_record(partial(run_processor, processor))["steps"]
    std = np.reshape(processor.image_std, (3, 1, 1))
    for picture in pictures():
        expected = run_processor(processor, picture).numpy()
        levels = np.abs(run_steps(picture, steps) - expected) * std * 255
        assert levels.max() < (0.001 if steps[0]["library"] == "torch" else 1.001)
    assert steps[0]["library"] == ("pillow" if name.endswith("Pil") or transformers.__version__ < "5" else "torch")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "sizes", [((40, 200), (32, 160)), ((23, 31), (43, 32)), ((301, 211), (32, 45)), ((9, 9), (9, 1))]
)
def test_a_resize_of_torch_is_repeated_bit_for_bit(sizes: Any, interpolation: str) -> None:
    (height, width), size = sizes
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    for image in (values, values // 128 * 255):
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        # Not torchvision's, which turns to floats on CPUs that an old one does not know.
        expected = interpolate(tensor, size, mode=interpolation, antialias=True)[0]
        assert np.array_equal(resize_tensor(image, size, interpolation), expected.permute(1, 2, 0).numpy())


def test_openai_and_processors_with_a_tokenizer_are_read() -> None:
    clip = pytest.importorskip("clip.clip", reason="OpenAI's clip is not installed")
    transform = clip._transform(64)
    assert grey_levels(preprocess_record(transform)["steps"], transform) == 0

    class Processor:
        image_processor = image_processor()

    assert preprocess_record(Processor()) == preprocess_record(Processor.image_processor)


def test_a_step_does_what_its_description_says() -> None:
    values = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    image = Image.fromarray(values)

    def run(*steps: dict[str, Any]) -> Any:
        return run_steps(image, [*steps, {"op": "to_float"}])

    assert np.array_equal(run(), values.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    crop = {"op": "center_crop", "size": [2, 1], "fill": 0}
    # 5 - 2 and 4 - 1 leave 1.5 at each side, which round makes 2 and floor 1.
    assert np.array_equal(run({**crop, "offset": "round"}) * 255, values[2:4, 2:3].transpose(2, 0, 1))
    assert np.array_equal(run({**crop, "offset": "floor"}) * 255, values[1:3, 1:2].transpose(2, 0, 1))
    padded = run({"op": "center_crop", "size": [5, 7], "fill": [255, 0, 51], "offset": "round"})
    assert padded.shape == (3, 5, 7) and np.allclose(padded[:, 0, 0], [1, 0, 0.2])
    assert np.array_equal(padded[:, :, 1:5], run())  # an odd pixel of padding goes behind
    resize = {"op": "resize", "interpolation": "bicubic", "library": "pillow"}
    assert run({**resize, "mode": "shortest", "size": 6}).shape == (3, 7, 6)  # 7.5
    assert run({**resize, "mode": "shortest", "size": [6, 6]}).shape == (3, 8, 6)  # 7.5, to even
    assert run({**resize, "mode": "longest", "size": [6, 6]}).shape == (3, 6, 5)
    assert run({**resize, "mode": "squash", "size": [2, 3]}).shape == (3, 2, 3)
    pixels = run_steps(image, [{"op": "to_float"}, {"op": "normalize", "mean": [0.5, 0, 1], "std": [1, 0.5, 2]}])
    scaled = values.transpose(2, 0, 1) / 255
    assert np.allclose(pixels, [scaled[0] - 0.5, scaled[1] * 2, (scaled[2] - 1) / 2], atol=1e-7)


def test_unknown_steps_are_refused() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"expected one of the steps resize, .*, got 'blur'"):
        run_steps(image, [{"op": "blur"}])
    with pytest.raises(ValueError, match="got steps without to_float"):
        run_steps(image, [])


class Shifted(transforms.CenterCrop):
    """A crop with a familiar name that takes other pixels."""

    def forward(self, image: Image.Image) -> Image.Image:
        return super().forward(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


Shifted.__name__ = "CenterCrop"


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda image: image, "whose steps can be read, got .*: pass preprocess="),
        (transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()]), "RandomHorizontalFlip"),
        (transforms.Compose([transforms.Resize(8), Shifted(8), transforms.ToTensor()]), "grey levels away from"),
        (transforms.Compose([transforms.Resize(8, max_size=12), transforms.ToTensor()]), "max_size=12"),
    ],
)
def test_a_preprocessing_that_steps_do_not_give_is_refused(preprocess: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        preprocess_record(preprocess)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": True}, "does not pad"),
        ({"rescale_factor": 1 / 127.5}, "divides by 255"),
        ({"size": {"longest_edge": 32}}, "height and width or shortest_edge"),
    ],
)
def test_image_processors_beyond_the_steps_are_refused(changes: dict[str, Any], message: str) -> None:
    processor = image_processor()
    for name, value in changes.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        preprocess_record(processor)
