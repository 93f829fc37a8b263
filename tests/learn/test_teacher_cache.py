"""TeacherCache: features up to rounding, encoded once, with concurrent writers and killed processes."""

import copy
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipkernels as ck
from clipkernels.images import Reader
from clipkernels.learn.distill import Teacher, TeacherCache, TeacherFeatures
from clipkernels.learn.distill import cache as module
from tests.mutants import read, write

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["is it a cat", "is it red", "is it a cat"]
ANSWERS = [["yes", "no"], ["no", "yes"], ["yes", "perhaps"]]


class Counting(Teacher):
    """A teacher that records the number of images and the texts of each call."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.images, self.texts = [], []

    def see(self, images, regions=True):
        self.images.append(len(images))
        return super().see(images, regions)

    def read(self, texts, words=True):
        self.texts.append(list(texts))
        return super().read(texts, words)


def counting(model):
    return Counting(model, ck.bundled()[2])


def behind(mask):
    """The mask (B,T) of the positions after the last word of each text."""
    return mask.flip(1).cumsum(1).flip(1) == 0


def assert_rounded(actual, expected, dtype):
    if expected.words is not None:
        assert actual.words.shape == expected.words.shape and not actual.words[behind(expected.words_mask)].any()
        expected = expected._replace(words=expected.words * ~behind(expected.words_mask)[..., None])
    for name, one, other in zip(TeacherFeatures._fields, actual, expected, strict=True):
        if other is None or other.dtype == torch.bool:
            assert one is other is None or torch.equal(one, other), name
        else:
            assert one.dtype == torch.float32, name
            # Products of other sizes are rounded otherwise, and the cache rounds once.
            torch.testing.assert_close(
                one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 if dtype.itemsize == 4 else 2e-3
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [None, ck.EViT(0.5, fuse=False), ck.ToMe(4)])
def test_a_cache_equals_its_teacher(dtype, method, tiny, images, tmp_path):
    if method is not None:
        ck.patch(tiny, method)
    teacher = counting(tiny)
    expected = teacher(images, TEXTS, ANSWERS)
    first = TeacherCache(tmp_path, teacher, dtype)(images, TEXTS, ANSWERS)
    assert_rounded(first, expected, dtype)
    teacher.images, teacher.texts = [], []
    again = TeacherCache(tmp_path, teacher, dtype)(images, TEXTS, ANSWERS)
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(again, first, strict=True))
    assert teacher.images == teacher.texts == []
    mixed = TeacherCache(tmp_path, teacher, dtype)(images[[2, 0, 2]], ["is it red", "is it a cat", "is it red"])
    assert torch.equal(mixed.regions, first.regions[[2, 0, 2]]) and torch.equal(mixed.words, first.words[[1, 0, 1]])
    assert mixed.answers is None


def test_nothing_is_encoded_twice(tiny, images, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher, batch_size=2)
    calls = []
    new = cache.add(
        [images[:2], images[2], images[0], images],
        iter(["a", "b", "a"]),
        progress=lambda *line: calls.append(line),
    )
    assert new == 5 and teacher.images == [2, 1] and teacher.texts == [["a", "b"]]
    assert [call[:2] for call in calls] == [("image", n + 1) for n in range(7)] + [("text", n) for n in (1, 2, 3)]
    assert [call[2] for call in calls] == [0, 2, 2, 2, 2, 2, 3, 0, 0, 2]
    assert len(list(tmp_path.iterdir())) == 3
    assert cache.add(images, ["b"]) == 0
    cache(images.flip(0), ["b", "c", "a"])
    assert teacher.images == [2, 1] and teacher.texts == [["a", "b"], ["c"]]
    other = images.clone()
    other[1, 0, 0, 0] += 1e-3
    cache(other, ["a", "b", "c"])
    cache(images.bfloat16(), ["a", "b", "c"])  # other values, another dtype
    assert teacher.images == [2, 1, 1, 2, 1]
    assert TeacherCache(tmp_path, teacher).add(torch.cat([images, other]), ["a", "b", "c"]) == 0


def test_a_photograph_read_another_way_is_another_image(tiny, tmp_path):
    _, preprocess, _ = ck.bundled()
    exif = Image.Exif()
    exif[274] = 6
    pixels = Image.effect_noise((40, 30), 90).convert("RGB")
    pixels.save(tmp_path / "photo.png", exif=exif)
    upright, sideways = (preprocess(Reader(turn).read(tmp_path / "photo.png"))[None] for turn in (True, False))
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path / "cache", teacher)
    first = cache(upright).image
    assert not torch.equal(cache(sideways).image, first) and teacher.images == [1, 1]
    assert torch.equal(TeacherCache(tmp_path / "cache", teacher)(upright).image, first) and teacher.images == [1, 1]


def test_missing_regions_and_words_are_encoded_on_request(tiny, images, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    assert cache.add(images, TEXTS, regions=False, words=False) == 5
    features = cache(images, TEXTS, regions=False, words=False)
    assert (
        features.regions is features.words is features.words_mask is None
        and len(teacher.images) == len(teacher.texts) == 1
    )
    assert_rounded(cache(images, TEXTS), teacher(images, TEXTS), torch.float16)
    # Answers need only embeddings, which texts with words also have.
    count = len(teacher.texts)
    cache(texts=["is it"], answers=["a cat", "red"])
    assert teacher.texts[count:] == [["is it"]]
    sizes = sorted(sorted(read(file)[1]) for file in tmp_path.iterdir())
    assert ["sha256", "text"] in sizes and ["image", "sha256"] in sizes and ["image", "regions", "sha256"] in sizes


def test_results_are_on_the_requested_device(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    assert all(x is None or x.device.type == "meta" for x in cache(images, TEXTS, ["yes"], device="meta"))
    assert cache(images.double(), TEXTS).image.dtype == torch.float32
    assert cache.width == 128


def test_a_cache_works_inside_a_training_step(tiny, images, tmp_path):
    cache, layer = TeacherCache(tmp_path, counting(tiny)), torch.nn.Linear(128, 1)
    for _ in range(2):
        features = cache(images.requires_grad_(), TEXTS)
        layer(features.regions).sum().add(layer(features.words).sum()).backward()
    assert not features.regions.requires_grad and images.grad is None


def test_an_error_loses_only_the_current_batch(tiny, tmp_path):
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = counting(tiny)

    def interrupted():
        yield from images[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TeacherCache(tmp_path, teacher, batch_size=2).add(interrupted())
    assert teacher.images == [2, 2]
    cache = TeacherCache(tmp_path, teacher, batch_size=2)
    assert cache.add(images) == 3
    assert_rounded(cache(images), teacher(images), torch.float16)


def test_partial_files_are_never_read_and_swept_when_old(tiny, images, tmp_path, monkeypatch):
    teacher = counting(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            TeacherCache(tmp_path, teacher).add(images)
    assert not list(tmp_path.iterdir())
    uuid = "0123456789abcdef" * 2
    old, new = f".{uuid}.safetensors.ab_de4gh", f".{uuid}.safetensors.ab_de5gh"
    others = [".0.safetensors.old", f".{uuid}.safetensors.rsync-x", ".model.safetensors.ab_de4gh", "notes.txt"]
    for name in (old, new, *others):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - (60 if name == new else 7200),) * 2)
    assert TeacherCache(tmp_path, teacher).add(images) == 3
    remaining = {file.name for file in tmp_path.iterdir()}
    assert {new, *others} < remaining and old not in remaining


def test_a_folder_that_is_refused_is_not_swept(tiny, images, tmp_path):
    partial = tmp_path / f".{'0' * 32}.safetensors.abcdefgh"
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    save_file({"image": images}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected features of a teacher"):
        TeacherCache(tmp_path, counting(tiny))
    assert partial.exists()
    (tmp_path / "a.safetensors").unlink()
    TeacherCache(tmp_path, counting(tiny))
    assert not partial.exists()


ENDLESS = """
import itertools, sys, torch
import clipkernels as ck
from clipkernels.learn.distill import Teacher, TeacherCache

torch.set_num_threads(1)
model, _, tokenizer = ck.bundled()
cache = TeacherCache(sys.argv[1], Teacher(model, tokenizer), batch_size=4)
generator = torch.Generator().manual_seed(0)
cache.add(torch.randn(3, 32, 32, generator=generator) for _ in itertools.count())
"""


def test_concurrent_writers_leave_complete_files_even_if_killed(tiny, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.randn(3, 32, 32, generator=generator) for _ in range(80)])
    writer = TeacherCache(tmp_path, counting(tiny), batch_size=1)
    killed_writer = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path])
    while not list(tmp_path.glob("*.safetensors")):
        assert killed_writer.poll() is None
        time.sleep(0.001)
    writer.add(images.flip(0)[:10], list("abc"))
    while len(list(tmp_path.glob("*.safetensors"))) < 16:  # at most eleven are this process's
        assert killed_writer.poll() is None
        time.sleep(0.001)
    killed_writer.send_signal(signal.SIGKILL)
    killed_writer.wait()
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    assert cache.add(torch.cat([images[:20], images[-10:]]), list("abc")) == 0
    cache.add(images)
    assert sum(len(load_file(file)["sha256"]) for file in tmp_path.glob("*.safetensors")) >= 83
    assert_rounded(cache(images), teacher(images), torch.float16)


def test_items_stored_by_another_process_are_not_encoded_again(tiny, images, tmp_path):
    one, other = counting(tiny), counting(tiny)
    first, second = TeacherCache(tmp_path, one), TeacherCache(tmp_path, other)
    first.add(images, ["a"])
    second(images, ["a", "a", "a"])
    assert second.add(images, ["a"]) == 0 and other.images == other.texts == []
    second.add(images.flip(1))
    first.add(images.flip(2))
    assert first.add(images.flip(1)) == second.add(images.flip(2)) == 0


def test_the_folder_is_listed_only_after_another_writer(tiny, images, tmp_path, monkeypatch):
    cache, other = TeacherCache(tmp_path, counting(tiny)), TeacherCache(tmp_path, counting(tiny))
    listings, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listings.append(folder) or listdir(folder))
    for turn in range(3):
        cache(images.roll(turn, 3), TEXTS)
    assert not listings
    other.add(images.roll(5, 3))
    listings.clear()
    cache(images.roll(5, 3), ["one", "two", "three"])
    assert len(listings) == 1 and len(cache.teacher.images) == 3


def test_the_number_of_mapped_files_is_limited(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_MAPPED_FILES", 4)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cache = TeacherCache(tmp_path, counting(tiny), batch_size=1)
    cache.add(images)
    cache(images[:1])
    for _ in range(2):
        assert_rounded(cache(images), cache.teacher(images), torch.float16)
        maps = Path("/proc/self/maps")
        if maps.exists():
            assert sum(str(tmp_path) in line for line in maps.read_text().splitlines()) == len(cache.maps) == 4
    cache(images[-4:-3])
    last = list(cache.maps)[-1]  # used last, so the last to be unmapped
    cache(images[:3])
    assert last in cache.maps


@pytest.mark.parametrize("batched", [True, False])
def test_a_loader_may_reuse_its_memory(batched, tiny, images, tmp_path):
    def filled():
        buffer = torch.empty_like(images[:1] if batched else images[0])
        for image in images:
            buffer.copy_(image)
            yield buffer

    cache = TeacherCache(tmp_path, counting(tiny))
    assert cache.add(filled()) == 3
    expected = Teacher(tiny, ck.bundled()[2])(images)
    assert_rounded(cache(images), expected, torch.float16)
    assert cache.teacher.images == [3]


def test_waiting_images_do_not_keep_their_batch_alive(tiny, images, tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path, counting(tiny))
    waiting, encode = [], cache._encode
    monkeypatch.setattr(
        cache, "_encode", lambda kind, items, detailed: waiting.extend(items.values()) or encode(kind, items, detailed)
    )
    cache.add([images.requires_grad_(), images[:1].expand(3, -1, -1, -1) + 1, images.mT])
    assert len(waiting) == 7
    for name, image in waiting:
        assert image.untyped_storage().nbytes() == 4 * 3 * 32 * 32 and not image.requires_grad, name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("visual.ln_post.bias", r"another image tower \(float32 .* instead of float32"),
        ("ln_final.bias", r"another text tower \(float32"),
        ("heads", r"another reading of a few texts \(other attention heads, .*\): choose another folder"),
        ("method", r"another method \(host instead of EViT\(keep=0\.5"),
        ("tokenizer", r"another tokenizer \([0-9a-f]{16} instead of [0-9a-f]{16}\): choose another folder"),
        ("dtype", r"another dtype \(float16 instead of bfloat16\)"),
    ],
)
def test_features_of_another_teacher_are_refused(change, match, tiny, images, tmp_path):
    TeacherCache(tmp_path, counting(tiny)).add(images)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other, tokenizer, dtype = copy.deepcopy(tiny), ck.bundled()[2], torch.float16
    if change == "method":
        ck.patch(other, ck.EViT(0.5))
    elif change == "tokenizer":
        tokenizer.context_length = 32
    elif change == "dtype":
        dtype = torch.bfloat16
    elif change == "heads":
        for block in other.transformer.resblocks:
            block.attn.num_heads, block.attn.head_dim = 2 * block.attn.num_heads, block.attn.head_dim // 2
    else:
        with torch.no_grad():
            other.get_parameter(change).add_(1e-3)
    if change == "tokenizer":
        other.positional_embedding = torch.nn.Parameter(other.positional_embedding[:32].detach())
        other.register_buffer("attn_mask", other.attn_mask[:32, :32], persistent=False)
        match = "another text tower .*, " + match.removeprefix("another ")
    with pytest.raises(ValueError, match=match):
        TeacherCache(tmp_path, Teacher(other, tokenizer), dtype)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_dense_patches_and_half_weights_keep_the_teacher(tiny, images, tmp_path):
    TeacherCache(tmp_path, counting(tiny)).add(images)
    assert TeacherCache(tmp_path, counting(ck.patch(copy.deepcopy(tiny), ck.Dense()))).add(images) == 0
    assert TeacherCache(tmp_path, counting(copy.deepcopy(tiny).half())).add(images) == 0


def test_a_teacher_patched_later_is_refused(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    cache.add(images[:2])
    ck.patch(tiny, ck.EViT(0.5))
    cache(images[:2])  # nothing is encoded
    with pytest.raises(ValueError, match=r"opened, got one with another method \(EViT\(keep=0\.5.* instead of host\)"):
        cache(images)


@pytest.mark.parametrize(
    ("weight", "tower"), [("visual.ln_post.bias", "image"), ("ln_final.bias", "text"), ("text_projection", "text")]
)
def test_a_teacher_with_changed_weights_is_refused(weight, tower, tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    cache.add(images[:2], ["a"])
    with torch.no_grad():
        tiny.get_parameter(weight).add_(1e-3)
    cache(images[:2], ["a", "a"])
    for arguments in ((images,), (None, ["b"])):
        with pytest.raises(ValueError, match=rf"opened, got one with another {tower} tower \(float32 .*another folder"):
            cache(*arguments)
    assert len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        tiny.get_parameter(weight).copy_(ck.bundled()[0].get_parameter(weight))
    assert cache.add(images) == 1  # the weights are restored


def test_a_teacher_may_be_cast_later(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    cache.add(images[:2])
    tiny.half()
    assert cache.add(images) == 1
    torch.testing.assert_close(cache(images).image, cache.teacher(images).image, rtol=1e-2, atol=1e-2)


def test_a_relative_folder_survives_a_change_of_directory(tiny, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = TeacherCache("features", counting(tiny), batch_size=1)
    cache.add(images[:1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache.add(images) == 2 and cache(images).image.shape == (3, 128)
    assert not list(Path().iterdir())


def test_other_files_are_refused(tiny, images, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*a\.safetensors"):
        TeacherCache(tmp_path, counting(tiny))
    save_file({"image": images}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"expected features of a teacher .*, got .*a\.safetensors with format None"):
        TeacherCache(tmp_path, counting(tiny))
    write(tmp_path / "a.safetensors", {"format": "other"}, {"image": images})
    with pytest.raises(ValueError, match="with format 'other'"):
        TeacherCache(tmp_path, counting(tiny))


def test_only_the_finite_features_of_a_batch_are_stored(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    expected = cache.teacher(images)
    images[1, 0, 0, 0] = float("nan")
    digest = module.content_hash(images[1]).hex()
    for encode in (cache, lambda x: cache.add([x[:1], x[1:]])):
        with pytest.raises(
            ValueError, match=rf"finite in float16, got others for image 1, .* \(SHA-256 {digest}\), one of 1"
        ):
            encode(images)
    assert [len(load_file(file)["image"]) for file in tmp_path.iterdir()] == [2]
    assert cache.add(images[[0, 2]]) == 0
    assert_rounded(
        cache(images[[2, 0]]), TeacherFeatures(*(x if x is None else x[[2, 0]] for x in expected)), torch.float16
    )
    with pytest.raises(ValueError, match=r"others for image 2, counted from 0 .* the other 0 are stored"):
        cache(images[[0, 2, 1, 1]])


def test_a_text_whose_features_are_not_finite_is_named(tiny, tmp_path):
    with torch.no_grad():
        tiny.text_projection.mul_(1e6)
    large = TeacherCache(tmp_path, counting(tiny))
    digest = sha256(b"a").hexdigest()
    with pytest.raises(ValueError, match=rf"finite in float16, got others for text 0, .* {digest}\), one of 2 in"):
        large.add(texts=["a", "b"])
    with pytest.raises(ValueError, match=r"got others for the text 'a' \(SHA-256"):
        large(texts=["a"])
    assert not list(tmp_path.iterdir())
    assert TeacherCache(tmp_path, counting(tiny), torch.bfloat16).add(texts=["a"]) == 1


def test_texts_of_different_lengths_are_padded(tiny, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    cache.add(texts=["a"])
    full = teacher.read(["b"])
    short = TeacherFeatures(text=full.text, words=full.words[:, :9], words_mask=full.words_mask[:, :9])
    cache._write("text", ["b"], [sha256(b"b").digest()], short)
    features = cache(texts=["b", "a", "b"])
    assert (
        features.words.shape == (3, 64, 128)
        and not features.words[0, 9:].any()
        and not features.words_mask[2, 9:].any()
    )
    torch.testing.assert_close(features.words[2, :2], full.words[0, :2], rtol=2e-3, atol=2e-3)
    assert cache(texts=["b"]).words.shape == (1, 9, 128)
    assert cache(texts=["b", "a"]).words.shape == (2, 64, 128)


def test_padding_is_not_stored(tiny, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    texts = ["is it a cat", "", "a"]
    cache.add(texts=texts)
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    words = teacher.read(texts).words_mask.sum(1).tolist()
    assert tensors["words"].shape == (3, 1 + words[0], 128) and tensors["words_mask"].shape == (3, 64) and words[1] == 0
    assert_rounded(cache(texts=texts), teacher(texts=texts), torch.float16)
    assert cache.add(texts=[" "]) == 1  # a text without words
    assert_rounded(cache(texts=[" ", "a"]), teacher(texts=[" ", "a"]), torch.float16)
    alone = cache(texts=[" "])
    assert alone.words.shape == (1, 64, 128) and not alone.words.any() and not alone.words_mask.any()


def test_an_empty_batch_gives_empty_features(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    for method in (None, ck.EViT(0.5, fuse=False)):
        if method is not None:
            cache = TeacherCache(tmp_path / "other", counting(ck.patch(tiny, method)))
        for source in (cache, cache.teacher):
            features = source(images[:0], [], ["yes", "no"])
            shapes = [tuple(x.shape) if x is not None else None for x in features]
            mask = None if method is None else (0, 64)
            assert shapes == [(0, 128), (0, 128), (0, 64, 128), (0, 64, 128), mask, (0, 64), (0, 2, 128)]
            assert all(x is None or x.dtype in (torch.float32, torch.bool) for x in features)
            assert source(images[:0]).regions.shape == (0, 64, 128) and source(images[:0], [], []).answers.shape[
                :2
            ] == (
                0,
                0,
            )
    assert cache.add(images[:0], []) == 0


def test_files_are_memory_mapped(tiny, images, tmp_path):
    teacher = counting(tiny)
    TeacherCache(tmp_path, teacher, batch_size=1).add(images)
    cache = TeacherCache(tmp_path, teacher)
    assert not cache.maps
    cache(images[1:2])
    ((file, mapped),) = cache.maps.items()
    assert torch.equal(load_file(file)["regions"], mapped["regions"])
    with open("/proc/self/maps") as maps:
        assert file.name in maps.read()


def test_inputs_that_do_not_fit_are_refused(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    wrong = {
        r"images must be an iterable of \(3,S,S\) or \(B,3,S,S\) of one size, got \(32, 32\)": {"images": images[0]},
        r"of one size, got \(3, 3, 16, 16\)": {"images": [images[0], images[..., :16, :16]]},
        "of one size, got list": {"images": [["path"]]},
        "texts must be an iterable of texts, got 'a cat'": {"texts": "a cat"},
        "texts must be an iterable of texts, got None": {"texts": None},
        "images must be an iterable of images, got None": {"images": None},
        "texts must be an iterable of strings, got 3 at 1": {"texts": ["a", 3]},
    }
    for match, arguments in wrong.items():
        with pytest.raises(ValueError, match=match):
            cache.add(**arguments)
    with pytest.raises(ValueError, match="one text for each image, got 3 images and 1 text"):
        cache(images, ["a"])
    with pytest.raises(ValueError, match="texts must be a list of strings, got None at 0"):
        cache(texts=[None])
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float16, .*, got torch\.int8"):
        TeacherCache(tmp_path, counting(tiny), torch.int8)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        TeacherCache(tmp_path, counting(tiny), batch_size=0)
