"""What a teacher says, kept: the same but for rounding, encoded once, whoever else writes and however a run ends."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipkernels as ck
from clipkernels.files import map_tensors, write_tensors
from clipkernels.learn.distill import Teacher, TeacherCache, TeacherFeatures

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["is it a cat", "is it red", "is it a cat"]
ANSWERS = [["yes", "no"], ["no", "yes"], ["yes", "perhaps"]]


class Counting(Teacher):
    """A teacher that remembers how many images and which texts it was asked about."""

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


def assert_rounded(came, expected, dtype):
    for name, one, other in zip(TeacherFeatures._fields, came, expected, strict=True):
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
def test_a_cache_says_what_its_teacher_says(dtype, method, tiny, images, tmp_path):
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
    seen = []
    new = cache.add(
        [images[:2], images[2], images[0], images],
        iter(["a", "b", "a"]),
        progress=lambda *each: seen.append(each),
    )
    assert new == 5 and teacher.images == [2, 1] and teacher.texts == [["a", "b"]]
    assert seen[0] == ("image", 1, 0) and ("image", 7, 3) in seen and seen[-1] == ("text", 3, 2)
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


def test_what_was_kept_without_its_parts_is_encoded_again_when_they_are_asked(tiny, images, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    assert cache.add(images, TEXTS, regions=False, words=False) == 5
    came = cache(images, TEXTS, regions=False, words=False)
    assert came.regions is came.words is came.words_mask is None and len(teacher.images) == len(teacher.texts) == 1
    assert_rounded(cache(images, TEXTS), teacher(images, TEXTS), torch.float16)
    # Answers are embeddings alone, for which texts with their words will do.
    count = len(teacher.texts)
    cache(texts=["is it"], answers=["a cat", "red"])
    assert teacher.texts[count:] == [["is it"]]
    sizes = sorted(sorted(map_tensors(file)[0]) for file in tmp_path.iterdir())
    assert ["sha256", "text"] in sizes and ["image", "sha256"] in sizes and ["image", "regions", "sha256"] in sizes


def test_results_are_where_they_are_wanted(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    assert all(x is None or x.device.type == "meta" for x in cache(images, TEXTS, ["yes"], device="meta"))
    assert cache(images.double(), TEXTS).image.dtype == torch.float32
    assert cache.width == 128


def test_a_cache_may_be_read_during_a_training_step(tiny, images, tmp_path):
    cache, layer = TeacherCache(tmp_path, counting(tiny)), torch.nn.Linear(128, 1)
    for _ in range(2):
        came = cache(images.requires_grad_(), TEXTS)
        layer(came.regions).sum().add(layer(came.words).sum()).backward()
    assert not came.regions.requires_grad and images.grad is None


def test_an_error_in_the_middle_loses_the_batch_in_hand_alone(tiny, tmp_path):
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = counting(tiny)

    def stopped():
        yield from images[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TeacherCache(tmp_path, teacher, batch_size=2).add(stopped())
    assert teacher.images == [2, 2]
    cache = TeacherCache(tmp_path, teacher, batch_size=2)
    assert cache.add(images) == 3
    assert_rounded(cache(images), teacher(images), torch.float16)


def test_half_a_file_is_never_seen_and_is_swept_when_it_is_old(tiny, images, tmp_path, monkeypatch):
    teacher = counting(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            TeacherCache(tmp_path, teacher).add(images)
    assert not list(tmp_path.iterdir())
    for name, age in ((".0.safetensors.old", 7200), (".1.safetensors.new", 60)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "notes.txt").write_text("mine")
    assert TeacherCache(tmp_path, teacher).add(images) == 3
    assert {"notes.txt", ".1.safetensors.new"} < {file.name for file in tmp_path.iterdir()}
    assert not (tmp_path / ".0.safetensors.old").exists()


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


def test_two_write_at_once_and_what_is_left_when_one_is_killed_is_whole(tiny, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.randn(3, 32, 32, generator=generator) for _ in range(80)])
    own = TeacherCache(tmp_path, counting(tiny), batch_size=1)
    endless = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path])
    while not list(tmp_path.glob("*.safetensors")):
        assert endless.poll() is None
        time.sleep(0.001)
    own.add(images.flip(0)[:10], list("abc"))
    while len(list(tmp_path.glob("*.safetensors"))) < 16:  # at most eleven are not of the other
        assert endless.poll() is None
        time.sleep(0.001)
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    assert cache.add(torch.cat([images[:20], images[-10:]]), list("abc")) == 0
    cache.add(images)
    assert sum(len(load_file(file)["sha256"]) for file in tmp_path.glob("*.safetensors")) >= 83
    assert_rounded(cache(images), teacher(images), torch.float16)


def test_what_another_process_has_kept_meanwhile_is_not_encoded_again(tiny, images, tmp_path):
    one, other = counting(tiny), counting(tiny)
    first, second = TeacherCache(tmp_path, one), TeacherCache(tmp_path, other)
    first.add(images, ["a"])
    second(images, ["a", "a", "a"])
    assert second.add(images, ["a"]) == 0 and other.images == other.texts == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("visual.ln_post.bias", r"another image tower \(float32 .* instead of float32"),
        ("ln_final.bias", r"another text tower \(float32"),
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


def test_a_dense_patch_and_half_weights_are_the_same_teacher(tiny, images, tmp_path):
    TeacherCache(tmp_path, counting(tiny)).add(images)
    assert TeacherCache(tmp_path, counting(ck.patch(copy.deepcopy(tiny), ck.Dense()))).add(images) == 0
    assert TeacherCache(tmp_path, counting(copy.deepcopy(tiny).half())).add(images) == 0


def test_a_teacher_that_was_patched_meanwhile_is_refused(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    cache.add(images[:2])
    ck.patch(tiny, ck.EViT(0.5))
    cache(images[:2])  # nothing is encoded
    with pytest.raises(ValueError, match=r"with the method host, got EViT\(keep=0\.5"):
        cache(images)


def test_other_files_are_refused(tiny, images, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*a\.safetensors"):
        TeacherCache(tmp_path, counting(tiny))
    save_file({"image": images}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"features of a teacher alone, got .*a\.safetensors in it: choose another"):
        TeacherCache(tmp_path, counting(tiny))
    write_tensors(tmp_path / "a.safetensors", {"image": images}, {"clipkernels": json.dumps({"format": "other"})})
    with pytest.raises(ValueError, match="features of a teacher alone"):
        TeacherCache(tmp_path, counting(tiny))


def test_features_that_are_not_finite_are_not_kept(tiny, images, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected image features that are finite in float16, got others of the image"):
        cache(images)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        tiny.text_projection.mul_(1e6)
    large = TeacherCache(tmp_path / "other", counting(tiny))
    with pytest.raises(ValueError, match="expected text features that are finite in float16"):
        large.add(texts=["a"])
    assert TeacherCache(tmp_path / "other", counting(tiny), torch.bfloat16).add(texts=["a"]) == 1


def test_texts_of_different_lengths_are_filled_up(tiny, tmp_path):
    teacher = counting(tiny)
    cache = TeacherCache(tmp_path, teacher)
    cache.add(texts=["a"])
    made = teacher.read(["b"])
    short = TeacherFeatures(text=made.text, words=made.words[:, :9], words_mask=made.words_mask[:, :9])
    cache._write("text", [sha256(b"b").digest()], short)
    came = cache(texts=["b", "a", "b"])
    assert came.words.shape == (3, 64, 128) and not came.words[0, 9:].any() and not came.words_mask[2, 9:].any()
    torch.testing.assert_close(came.words[2, :9], made.words[0, :9], rtol=2e-3, atol=2e-3)
    assert cache(texts=["b"]).words.shape == (1, 9, 128)


def test_files_are_read_where_they_lie(tiny, images, tmp_path):
    teacher = counting(tiny)
    TeacherCache(tmp_path, teacher, batch_size=1).add(images)
    cache = TeacherCache(tmp_path, teacher)
    assert not any(cache.files.values())
    cache(images[1:2])
    (file,) = [file for file, tensors in cache.files.items() if tensors]
    assert torch.equal(load_file(file)["regions"], cache.files[file]["regions"])
    with open("/proc/self/maps") as maps:
        assert file.name in maps.read()


def test_what_does_not_fit_is_an_error(tiny, images, tmp_path):
    cache = TeacherCache(tmp_path, counting(tiny))
    wrong = {
        r"images must be \(3,S,S\) or \(B,3,S,S\) one after .* size, got \(32, 32\)": {"images": images[0]},
        r"of one size, got \(3, 3, 16, 16\)": {"images": [images[0], images[..., :16, :16]]},
        "one after the other, of one size, got list": {"images": [["path"]]},
        "texts must be strings one after the other, got the string 'a cat'": {"texts": "a cat"},
    }
    for match, arguments in wrong.items():
        with pytest.raises(ValueError, match=match):
            cache.add(**arguments)
    with pytest.raises(ValueError, match="one text for each image, got 3 images and 1 texts"):
        cache(images, ["a"])
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float16, .*, got torch\.int8"):
        TeacherCache(tmp_path, counting(tiny), torch.int8)
    with pytest.raises(ValueError, match="batch_size must be at least one, got 0"):
        TeacherCache(tmp_path, counting(tiny), batch_size=0)
