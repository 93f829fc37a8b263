"""The bundled model, its tokenizer, and the images drawn for it."""

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.data import digits, scenes
from clipkernels.data.tokenizer import ByteTokenizer

HELD_OUT = 1_000_000


def test_token_ids_are_bytes_between_a_start_and_an_end():
    ids = ByteTokenizer(8)(["Ab", "é", "much too long for it", ""])
    assert ids.tolist() == [
        [257, 98, 99, 258, 0, 0, 0, 0],
        [257, 196, 170, 258, 0, 0, 0, 0],
        [257, *(1 + b for b in b"much t"), 258],
        [257, 258, 0, 0, 0, 0, 0, 0],
    ]
    assert ByteTokenizer(8)("a", context_length=4).tolist() == [[257, 98, 258, 0]]


@pytest.mark.parametrize("draw", [scenes.draw, digits.draw])
def test_drawings_depend_on_the_seed_alone(draw):
    one, repeated, other = draw(20, 3), draw(20, 3), draw(20, 4)
    assert np.array_equal(one.images, repeated.images) and np.array_equal(one.labels, repeated.labels)
    assert not np.array_equal(one.images, other.images)
    assert one.images.shape == (20, 32, 32, 3) and one.images.dtype == np.uint8


def test_unseen_pairs_have_every_colour_and_every_shape_once():
    pairs = [scenes.CLASSES[index].split() for index in scenes.UNSEEN]
    assert sorted(c for c, _ in pairs) == sorted(scenes.COLOURS)
    assert sorted(s for _, s in pairs) == sorted(scenes.SHAPES)
    assert not set(scenes.draw(500, 0).labels) & scenes.UNSEEN
    assert set(scenes.draw(500, 0, tuple(scenes.UNSEEN)).labels) == scenes.UNSEEN


def test_digits_have_the_writer_split_of_scikit_learn():
    train, held_out = digits.load(held_out=False), digits.load(held_out=True)
    assert len(train.labels) == 898 and len(held_out.labels) == 899
    assert train.labels[:10].tolist() == list(range(10))
    assert train.images.max() == 16
    drawn = digits.draw(899, 0)
    assert np.bincount(drawn.labels).tolist() == np.bincount(held_out.labels).tolist()


def test_loading_the_bundled_model_keeps_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ck.bundled()
    assert torch.equal(torch.rand(1), expected)


def test_preprocessing_takes_any_pil_image():
    _, preprocess, _ = ck.bundled()
    assert preprocess(Image.new("L", (200, 90))).shape == (3, 32, 32)


@torch.no_grad()
def _accuracy(data, names, templates, method):
    """The share of images that the bundled model classifies correctly."""
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, names, templates, method=method)
    images = torch.stack([preprocess(Image.fromarray(image)) for image in data.images])
    return (classifier(images).argmax(1).numpy() == data.labels).mean()


@pytest.mark.parametrize(
    ("name", "least"), [("digits", 0.95), ("scenes", 0.90)], ids=["held-out digits", "seen scene pairs"]
)
def test_the_bundled_model_classifies_digits_and_scenes(name, least):
    module = {"digits": digits, "scenes": scenes}[name]
    data = module.draw(200, HELD_OUT)
    assert _accuracy(data, module.CLASSES, module.TEMPLATES, None) >= least
    # Dropping half of the patches costs some accuracy, but not all of it.
    assert _accuracy(data, module.CLASSES, module.TEMPLATES, ck.EViT(0.7)) >= least - 0.25
