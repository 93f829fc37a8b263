"""Support sets: their files, and refused input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipkernels as ck
from clipkernels import fingerprint, support
from clipkernels.data import digits
from clipkernels.images import Reader
from clipkernels.support import SupportSet, features, folders
from tests.mutants import read, write
from tests.support.fixtures import NAMES, contents, retrieve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_saved_set_loads_unchanged(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=4, name="bundled", pretrained="none")
    support_set.save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert torch.equal(loaded.features, support_set.features) and torch.equal(loaded.labels, support_set.labels)
    assert (loaded.classes, loaded.prompts, loaded.about) == (
        support_set.classes,
        support_set.prompts,
        support_set.about,
    )
    assert [image.sha256 for image in loaded.images] == [image.sha256 for image in support_set.images]
    for copy, image in zip(loaded.images, support_set.images, strict=True):
        assert Path(copy.path).read_bytes() == Path(image.path).read_bytes()
    assert (loaded.about["kind"], loaded.about["model"], loaded.about["pretrained"]) == ("LC", "bundled", "none")


def test_equal_sets_give_equal_files(bundled: Any, photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        retrieve(bundled, photos, per_class=3).save(tmp_path / name)
    retrieve(bundled, photos, per_class=3).save(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_changed_set_removes_its_old_copies(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, ["nine", *NAMES], per_class=9).save(tmp_path / "set")
    retrieve(bundled, photos, per_class=4).save(tmp_path / "set")
    retrieve(bundled, photos, per_class=4).save(tmp_path / "fresh")
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == sorted(NAMES)


def test_foreign_images_are_never_touched(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=2)
    support_set.save(tmp_path / "set")
    mine = tmp_path / "set" / "zero" / "mine.png"
    shutil.copy(photos / "0" / "00.png", mine)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected only the support set's images in .*zero, got 'mine.png': delete"):
        retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_without_copies_the_manifest_holds_the_paths(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=2)
    support_set.save(tmp_path / "set", copy=False)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["features.safetensors", "manifest.json"]
    assert SupportSet.load(tmp_path / "set", bundled[0]).images == support_set.images
    with pytest.raises(ValueError, match="expected a support set with copies of its images"):
        support.refresh(tmp_path / "set", *bundled[:2])


def test_an_image_that_changed_since_it_was_encoded_is_not_copied(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=2)
    Image.new("RGB", (9, 9)).save(support_set.images[3].path)
    with pytest.raises(ValueError, match=r"as it was encoded, SHA-256 .* encode it again"):
        support_set.save(tmp_path / "set")


def test_an_interrupted_save_can_be_repeated(
    bundled: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkernels.support import store

    support_set, copied = retrieve(bundled, photos, per_class=4), []
    copy_image = store.copy_image

    def interrupted(*arguments: Any) -> None:
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(arguments)
        copy_image(*arguments)

    monkeypatch.setattr(store, "copy_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        support_set.save(tmp_path / "set")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"expected a finished support set, got .*set, whose .* build it again"):
        SupportSet.load(tmp_path / "set", bundled[0])
    retrieve(bundled, photos, per_class=2).save(tmp_path / "set")
    assert SupportSet.load(tmp_path / "set", bundled[0]).counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize("build", ["another", "finer", "activation"])
def test_another_tower_is_refused(build: str, bundled: Any, photos: Path, tmp_path: Path, tiny: Any) -> None:
    retrieve(bundled, photos, name="bundled").save(tmp_path / "set")
    if build == "another":
        torch.manual_seed(0)
        tiny = open_clip.CLIP(
            128,
            {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64},
            {"context_length": 64, "vocab_size": 259, "width": 64, "heads": 1, "layers": 1},
        )
    elif build == "finer":
        with torch.no_grad():
            for weight in tiny.visual.transformer.parameters():
                weight.mul_(1 + 1e-6)
    else:
        for block in tiny.visual.transformer.resblocks:
            block.mlp.gelu = open_clip.transformer.QuickGELU()
    with pytest.raises(
        ValueError, match=r"expected the tower of .*set \(bundled, no tag; float32 .* got another tower"
    ):
        SupportSet.load(tmp_path / "set", tiny)
    with pytest.raises(ValueError, match="got another tower"):
        support.refresh(tmp_path / "set", tiny, bundled[1])


@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5), ck.ToMe(4)])
def test_a_patched_tower_is_the_same_tower(
    method: ck.Method, bundled: Any, photos: Path, tmp_path: Path, tiny: Any
) -> None:
    support_set = retrieve(bundled, photos, per_class=2)
    support_set.save(tmp_path / "set")
    ck.patch(tiny, method)
    assert fingerprint.fingerprint(tiny) == fingerprint.fingerprint(bundled[0])
    assert torch.equal(SupportSet.load(tmp_path / "set", tiny).features, support_set.features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_towers_are_compared_in_their_lower_precision(
    dtype: torch.dtype, photos: Path, tmp_path: Path, tiny: Any, bundled: Any
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.add_(1e-4 * torch.randn_like(weight))  # more precise than the fp16 of the bundled file
    kinds = {name: support.photo(["one"]) for name in ("wide", "narrow")}
    support.retrieve(tiny, *bundled[1:], kinds["wide"], photos, per_class=2).save(tmp_path / "wide")
    wide = fingerprint.fingerprint(tiny)
    tiny.to(dtype)
    narrow = fingerprint.fingerprint(tiny)
    assert len(wide) > len(narrow) and fingerprint.same_tower(wide, narrow)
    assert SupportSet.load(tmp_path / "wide", tiny).features.dtype == torch.float32
    with torch.no_grad():
        tiny.visual.conv1.weight[0, 0, 0, 0] += 1
    assert not fingerprint.same_tower(wide, fingerprint.fingerprint(tiny))


def test_float16_and_bfloat16_towers_are_not_interchangeable(
    bundled: Any, photos: Path, tmp_path: Path, tiny: Any
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.copy_(0.05 * torch.randn_like(weight))
    wide, half = deepcopy(tiny), deepcopy(tiny).half()
    support.retrieve(half, *bundled[1:], support.photo(["one"]), photos, per_class=2).save(tmp_path / "set")
    assert list(fingerprint.fingerprint(half)) == ["float16"]
    assert len(SupportSet.load(tmp_path / "set", wide).features) == 2
    message = r"set \(.*\) in float32 or float16, got bfloat16: the two cannot be compared"
    for brain in (deepcopy(wide).bfloat16(), deepcopy(half).bfloat16()):
        with pytest.raises(ValueError, match=message):
            SupportSet.load(tmp_path / "set", brain)
    assert not fingerprint.same_tower({}, {})


def test_the_text_tower_is_not_compared(bundled: Any, tiny: Any) -> None:
    with torch.no_grad():
        tiny.text_projection.add_(1)
    assert fingerprint.fingerprint(tiny) == fingerprint.fingerprint(bundled[0])


def test_a_compiled_model_is_the_same_tower(bundled: Any) -> None:
    compiled = torch.nn.Module()
    compiled._orig_mod = bundled[0]  # as in torch.compile's wrapper
    assert fingerprint.fingerprint(compiled) == fingerprint.fingerprint(bundled[0])


def test_altered_features_are_refused(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=2).save(tmp_path / "set")
    file = tmp_path / "set" / "features.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "features": tensors["features"].flip(0)}, file)
    with pytest.raises(
        ValueError, match=r"expected SHA-256 \w{64} of .*features.safetensors, got \w{64}: build the set"
    ):
        SupportSet.load(tmp_path / "set", bundled[0])
    file.unlink()
    with pytest.raises(ValueError, match="got no file: build the set again"):
        SupportSet.load(tmp_path / "set", bundled[0])


def test_added_or_removed_images_need_a_refresh(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    shutil.copy(photos / "0" / "00.png", tmp_path / "set" / "zero" / "mine.png")
    for path in sorted((tmp_path / "set" / "three").iterdir())[:2]:
        path.unlink()
    with pytest.raises(ValueError, match=r"expected the 9 images of the manifest in .* got 1 more and 2 fewer"):
        SupportSet.load(tmp_path / "set", bundled[0])
    for name in NAMES:
        shutil.rmtree(tmp_path / "set" / name)
    assert len(SupportSet.load(tmp_path / "set", bundled[0]).features) == 9


def test_a_refresh_encodes_only_new_images(bundled: Any, photos: Path, tmp_path: Path, encoded: list[int]) -> None:
    support_set = retrieve(bundled, photos, per_class=3)
    support_set.save(tmp_path / "set")
    del encoded[:]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "set" / "zero" / "mine.png")
    min((tmp_path / "set" / "three").iterdir()).unlink()
    fresh = support.refresh(tmp_path / "set", *bundled[:2])
    assert encoded == [1]
    assert fresh.counts.tolist() == [3, 4, 2]
    assert torch.equal(fresh.features[:6], support_set.features[:6]) and torch.equal(
        fresh.features[7:], support_set.features[7:]
    )
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert torch.equal(loaded.features, fresh.features) and loaded.about == support_set.about
    again = support.refresh(tmp_path / "set", *bundled[:2])
    assert encoded == [1] and torch.equal(again.features, fresh.features)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    sources = [image.get("source") for image in manifest["classes"][1]["images"]]
    assert sources == [*(image.path for image in support_set.images[3:6]), None]


def test_a_refresh_names_classes_without_images(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "three")
    with pytest.raises(ValueError, match="expected an image in the folder for every class, got none for 'three'"):
        support.refresh(tmp_path / "set", *bundled[:2])
    (tmp_path / "set" / "three").mkdir()
    (tmp_path / "set" / "three" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got unreadable '.*text.png': delete"):
        support.refresh(tmp_path / "set", *bundled[:2], report=lambda line: None)


def test_class_names_unfit_for_file_names_get_distinct_folders(bundled: Any, photos: Path, tmp_path: Path) -> None:
    classes = ["a/b", "a_b", "Apple", "apple", "..", "żółw 龟", " /", "con", "x" * 300, "a:b", "tail.", "-rf"]
    classes += ["Manifest.json", ".hidden", "line\nbreak"]
    support_set = folders.folder_names(classes)
    assert len({name.casefold() for name in support_set}) == len(classes)
    assert all(Path(name).name == name and len(name) < 100 and name[0] not in ".-" for name in support_set)
    assert (support_set[1], support_set[5]) == ("a_b", "żółw 龟")
    retrieve(bundled, photos, classes, per_class=1).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert list(loaded.classes) == classes
    assert [Path(image.path).parent for image in loaded.images] == [tmp_path / "set" / name for name in support_set]
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == sorted(support_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format="other.2"), "with format 'other.2'"),
        (lambda manifest: manifest.pop("tower"), "missing required field `tower`"),
        (lambda manifest: manifest["classes"][0].update(folder=".."), "the name '..'"),
        (lambda manifest: manifest["classes"][0]["images"][0].update(file="../x.png"), "the name '../x.png'"),
    ],
)
def test_an_invalid_manifest_is_refused(
    change: Callable[[Any], Any], message: str, bundled: Any, photos: Path, tmp_path: Path
) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    manifest, _ = read(file)
    change(manifest)
    write(file, manifest, {})
    with pytest.raises(ValueError, match=r"expected the manifest of a support set .*, got") as caught:
        SupportSet.load(tmp_path / "set", bundled[0])
    assert message in str(caught.value)


def test_a_retrieved_set_helps_tip_adapter(bundled: Any, photos: Path) -> None:
    support_set = retrieve(bundled, photos, list(digits.CLASSES), per_class=2)
    text = support.class_embeddings(bundled[0], bundled[2], support_set.prompts)
    head = ck.TipAdapter(text, support_set.features, support_set.labels)
    logits = head(support_set.features)
    assert logits.shape == (20, 10) and logits.isfinite().all()


@pytest.fixture
def interrupted_set(bundled: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set whose save over an earlier one was interrupted while copying."""
    from clipkernels.support import store

    retrieve(bundled, photos, per_class=4).save(tmp_path / "set")
    copy_image, copied = store.copy_image, []

    def stop(*arguments: Any) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(copy_image(*arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "copy_image", stop)
        retrieve(bundled, photos, ["one", "zero"], per_class=3).save(tmp_path / "set")
    return tmp_path / "set"


def test_a_set_with_an_interrupted_save_is_unfinished(
    bundled: Any, interrupted_set: Path, photos: Path, tmp_path: Path
) -> None:
    message = r"expected a finished support set, got .*set, whose saving was interrupted: build it again"
    with pytest.raises(ValueError, match=message):
        SupportSet.load(interrupted_set, bundled[0])
    with pytest.raises(ValueError, match=message):
        support.refresh(interrupted_set, *bundled[:2])
    retrieve(bundled, photos, ["two"], per_class=1).save(interrupted_set)
    retrieve(bundled, photos, ["two"], per_class=1).save(tmp_path / "fresh")
    assert contents(interrupted_set) == contents(tmp_path / "fresh")


def test_an_interrupted_save_has_removed_no_image(interrupted_set: Path) -> None:
    images = [path.parent.name for path in interrupted_set.rglob("*.png")]
    assert [images.count(name) for name in NAMES] == [4, 4, 4] and images.count("one") == 2


def test_a_set_with_missing_originals_is_not_overwritten(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    (file,) = photos.parent.glob("photos.*.safetensors")
    shutil.rmtree(photos)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected .*png as it was encoded, SHA-256 .*, got no file"):
        retrieve(bundled, file, ["one", "nine"], per_class=9).save(tmp_path / "set")
    assert contents(tmp_path / "set") == before
    retrieve(bundled, file, per_class=3).save(tmp_path / "set")
    assert contents(tmp_path / "set").keys() == before.keys()


def test_a_renamed_class_keeps_its_images(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    support_set = SupportSet.load(tmp_path / "set", bundled[0])
    prompts = {
        "seven": support_set.prompts["seven"],
        "null": support_set.prompts["zero"],
        "three": support_set.prompts["three"],
    }
    support_set._replace(classes=tuple(prompts), prompts=prompts).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.classes == ("seven", "null", "three") and torch.equal(loaded.features, support_set.features)
    assert [image.sha256 for image in loaded.images] == [image.sha256 for image in support_set.images]
    assert not (tmp_path / "set" / "zero").exists() and len(list((tmp_path / "set" / "null").iterdir())) == 3


def test_an_image_with_another_label_moves(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    support_set = SupportSet.load(tmp_path / "set", bundled[0])
    sources = {image.sha256: image.path for image in retrieve(bundled, photos, per_class=3).images}
    support_set._replace(labels=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.counts.tolist() == [4, 2, 3]
    assert [image.sha256 for image in loaded.images] == [image.sha256 for image in support_set.images]
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    moved = manifest["classes"][0]["images"][3]
    assert moved["source"] == sources[moved["sha256"]]  # not the removed copy


def test_a_set_inside_its_collection_is_not_searched(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=4).save(photos / "0" / "set")
    retrieve(bundled, photos, per_class=2).save(photos / "0" / "set")
    retrieve(bundled, photos, per_class=2).save(tmp_path / "fresh")
    assert contents(photos / "0" / "set") == contents(tmp_path / "fresh")


def test_missing_or_stale_images_are_refused_without_copies(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=2)
    support_set.save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    prompts = {name.upper(): sentences for name, sentences in loaded.prompts.items()}
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match=r"stay where they are, got .*png, which is a copy of the earlier set"):
        loaded._replace(classes=tuple(prompts), prompts=prompts).save(tmp_path / "set", copy=False)
    shutil.rmtree(photos)
    with pytest.raises(ValueError, match=r"stay where they are, got .*png, which does not exist"):
        support_set.save(tmp_path / "set", copy=False)
    assert contents(tmp_path / "set") == before


def test_an_image_replaced_under_its_name_needs_a_refresh(bundled: Any, photos: Path, tmp_path: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=3)
    support_set.save(tmp_path / "set")
    copy = min((tmp_path / "set" / "three").iterdir())
    Image.new("RGB", (40, 40), "red").save(copy)
    with pytest.raises(
        ValueError, match=f"expected the images of the manifest, got other content in '{copy}': refresh"
    ):
        SupportSet.load(tmp_path / "set", bundled[0])
    with pytest.raises(ValueError, match=f"only the support set's images in .*three, got '{copy.name}': delete"):
        support_set.save(tmp_path / "set")
    fresh = support.refresh(tmp_path / "set", *bundled[:2])
    assert torch.equal(SupportSet.load(tmp_path / "set", bundled[0]).features, fresh.features)
    assert not torch.equal(fresh.features, support_set.features)


def test_a_link_in_a_class_folder_is_one_of_its_images(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=2).save(tmp_path / "set")
    (tmp_path / "set" / "zero" / "mine.png").symlink_to(photos / "0" / "00.png")
    assert support.refresh(tmp_path / "set", *bundled[:2]).counts.tolist() == [2, 3, 2]
    assert SupportSet.load(tmp_path / "set", bundled[0]).counts.tolist() == [2, 3, 2]
    assert (tmp_path / "set" / "zero" / "mine.png").is_symlink()


def test_a_folder_name_fits_every_file_system_in_bytes() -> None:
    assert len(folders.folder_names(["\U00010380" * 300])[0].encode()) <= 255


def test_equal_sets_hold_no_trace_of_their_machine(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert set(manifest) == {
        "format",
        "sha256",
        *SupportSet.load(tmp_path / "set", bundled[0]).about,
        "features",
        "classes",
    }
    assert set(manifest["classes"][0]) == {"name", "folder", "prompts", "images"}


def test_foreign_files_among_the_parts_stay(bundled: Any, photos: Path) -> None:
    who = features.encoder_of(*bundled[:2], Reader())
    parts = photos.parent / f"cache.{who.key}.parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("mine")
    retrieve(bundled, photos, cache=photos.parent / "cache")
    assert contents(parts) == {"notes.txt": b"mine"}


def test_a_save_that_cannot_remove_copies_loses_nothing(
    bundled: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    support_set = SupportSet.load(tmp_path / "set", bundled[0])
    before = {image.sha256 for image in support_set.images}

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "unlink", fail)
        support_set._replace(labels=support_set.labels.flip(0)).save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"build .* again"):
        SupportSet.load(tmp_path / "set", bundled[0])
    assert before <= {folders.hash_of(path) for path in (tmp_path / "set").rglob("*.png")}


def test_class_names_of_one_folder_lose_no_image(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, ["cat"], per_class=3).save(tmp_path / "set")
    (tmp_path / "set" / "Cat").symlink_to("cat")  # like a file system that ignores case
    support_set = SupportSet.load(tmp_path / "set", bundled[0])
    support_set._replace(classes=("Cat",), prompts={"Cat": support_set.prompts["cat"]}).save(tmp_path / "set")
    assert SupportSet.load(tmp_path / "set", bundled[0]).counts.tolist() == [3]
    assert len(list((tmp_path / "set" / "cat").iterdir())) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_pipe_among_the_images_of_a_class_is_named(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=5).save(tmp_path / "set")
    os.mkfifo(tmp_path / "set" / "zero" / "pipe.png")
    with pytest.raises(ValueError, match=r"expected the 15 images of the manifest .*, got 1 more and 0 fewer"):
        SupportSet.load(tmp_path / "set", bundled[0])
    with (
        pytest.warns(UserWarning, match=r"skipped .*pipe\.png: not a regular file"),
        pytest.raises(ValueError, match=r"got unreadable '.*pipe\.png': delete"),
    ):
        support.refresh(tmp_path / "set", *bundled[:2])
