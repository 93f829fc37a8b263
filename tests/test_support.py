"""Support sets: prompts, retrieval, generation, what is on disk, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels import support
from clipkernels.data import digits
from clipkernels.files import read_tensors
from clipkernels.support import SupportSet, collection, diffusion, features, folders

ROOT = Path(__file__).parent.parent
NAMES = ["seven", "zero", "three"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundled() -> Any:
    return ck.bundled()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits, in folders that say nothing of their class."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder = tmp_path_factory.mktemp("drawn")
    for index, image in enumerate(digits.draw(60, 3).images):
        path = folder / f"{index % 3}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def photos(drawn: Path, tmp_path: Path) -> Path:
    """The same for one test, with nothing beside them."""
    return Path(shutil.copytree(drawn, tmp_path / "photos"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that is encoded."""
    sizes: list[int] = []
    encode_image = features.encode_image

    def counted(model: Any, images: Tensor) -> Any:
        sizes.append(len(images))
        return encode_image(model, images)

    monkeypatch.setattr(features, "encode_image", counted)
    return sizes


def prompts_of(classes: list[str], templates: tuple[str, ...] = digits.TEMPLATES) -> dict[str, list[str]]:
    return support.photo(classes, templates)


def retrieve(bundled: Any, photos: Path | str, classes: list[str] = NAMES, **options: Any) -> SupportSet:
    return support.retrieve(*bundled, prompts_of(classes), photos, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(found: SupportSet) -> list[list[str]]:
    """The files of each class."""
    return [
        [Path(image.path).name for image, label in zip(found.images, found.labels, strict=True) if label == k]
        for k in range(len(found.classes))
    ]


# Prompts


def test_photo_fills_one_template() -> None:
    assert support.photo(["zebra", "apple"]) == {"zebra": ["a photo of a zebra."], "apple": ["a photo of a apple."]}


def test_the_ensemble_has_the_seven_published_templates() -> None:
    assert support.photo(["cat"], support.ENSEMBLE)["cat"] == [
        "itap of a cat.",
        "a bad photo of the cat.",
        "a origami cat.",
        "a photo of the large cat.",
        "a cat in a video game.",
        "art of the cat.",
        "a photo of the small cat.",
    ]


def test_short_answers_and_those_that_begin_with_a_question_mark_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    said = {"cat": ["A cat\nhas  fur.", "?What is a cat?", "No.", "  ? no", "four", "fives", ""], "dog": ["It barks."]}
    file.write_text(json.dumps(said), encoding="utf-8")
    assert support.cupl(["cat"], file) == support.cupl(["cat"], said) == {"cat": ["A cat has fur.", "fives"]}


def test_classes_without_sentences_are_named(tmp_path: Path) -> None:
    said = {"cat": ["?", "no"], "dog": ["It barks."], "ant": []}
    with pytest.raises(ValueError, match=r"got none for 'cat', 'ant'$"):
        support.cupl(["cat", "dog", "ant"], said)
    with pytest.raises(ValueError, match=r"expected sentences for every class, got none for 'cow'$"):
        support.cupl(["dog", "cow"], said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON file of sentences per class, got"),
        ("[]", "with a list"),
        ('{"cat": "It has fur."}', "expected a list of sentences for 'cat', got 'It has fur.'"),
        ('{"cat": ["It has fur.", 3]}', "expected sentences for 'cat' to be strings, got 3"),
    ],
)
def test_a_file_that_holds_no_sentences_per_class_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        support.cupl(["cat"], tmp_path / "said.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_generator_is_asked_every_question_ten_times_per_class() -> None:
    asked: list[list[str]] = []

    def generate(questions: list[str]) -> list[str]:
        asked.append(questions)
        return [f"{question} {number}" if number else "?" for number, question in enumerate(questions)]

    found = support.cupl(["cat", "dog"], generate, questions=("What is a {}?", "Describe a {}."))
    assert asked[1] == 10 * ["What is a dog?"] + 10 * ["Describe a dog."]
    assert found["dog"][0] == "What is a dog? 1" and found["dog"][-1] == "Describe a dog. 19"
    assert len(found["cat"]) == 19
    with pytest.raises(ValueError, match="expected an answer to each of 50 questions about 'cat', got 1"):
        support.cupl(["cat"], lambda questions: ["A cat."])


def test_combined_has_both_lists() -> None:
    both = support.combined(support.photo(["cat", "dog"]), {"dog": ["It barks."], "cat": ["It purrs."]})
    assert both == {"cat": ["a photo of a cat.", "It purrs."], "dog": ["a photo of a dog.", "It barks."]}
    with pytest.raises(ValueError, match="expected prompts for the same classes, got 'dog' in one alone"):
        support.combined(support.photo(["cat", "dog"]), {"cat": ["It purrs."]})


def test_class_embeddings_are_means_over_lists_of_different_lengths(bundled: Any) -> None:
    model, _, tokenizer = bundled
    prompts = {"zero": ["the digit zero.", "zero", "0"], "one": ["the digit one."]}
    came = support.class_embeddings(model, tokenizer, prompts)
    with torch.no_grad():
        for row, sentences in zip(came, prompts.values(), strict=True):
            expected = normalize(normalize(model.encode_text(tokenizer(sentences)), dim=-1).mean(0), dim=0)
            torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("prompts", [{}, {"cat": []}, {"cat": "a cat"}, {"cat": [1]}, ["cat"], {" ": ["a"]}])
def test_prompts_that_are_no_lists_per_class_are_refused(bundled: Any, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts must|classes must"):
        support.class_embeddings(bundled[0], bundled[2], prompts)


# Retrieval


@torch.no_grad()
def test_retrieval_is_a_literal_argsort(bundled: Any, photos: Path) -> None:
    model, preprocess, tokenizer = bundled
    found = retrieve(bundled, photos, per_class=7)
    paths = sorted(photos.rglob("*.png"))
    images = normalize(model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths])), dim=1)
    prompts = prompts_of(NAMES)
    expected = []
    for name in NAMES:
        text = normalize(model.encode_text(tokenizer(prompts[name])), dim=1)
        expected += (images @ text.T).amax(1).argsort(descending=True, stable=True)[:7].tolist()
    assert [image.path for image in found.images] == [str(paths[row]) for row in expected]
    assert found.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    torch.testing.assert_close(found.features, images[expected])
    assert found.features.dtype == torch.float32 and not found.features.is_inference()


def test_ties_go_to_the_lower_index_however_many_there_are() -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    rows = normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    many = rows[[3, 2, 1, 0] * 50]
    index = faiss.IndexFlatIP(16)
    index.add(many.numpy())
    best = [(rows[0] @ rows.T).argsort(descending=True)[1].item(), 0]
    first = [row for row in range(200) if 3 - row % 4 == 0]
    second = [row for row in range(200) if 3 - row % 4 == best[0]]
    assert collection._nearest(index, many, rows[:1], 3, None) == first[:3]
    assert collection._nearest(index, many, rows[:1], 60, None) == first + second[:10]
    assert collection._nearest(index, many, rows[:1], 300, 0.99) == first


def test_labels_follow_the_order_of_the_classes_not_of_the_folders(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, ["zebra", "apple"], per_class=2).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.classes == ("zebra", "apple")
    assert loaded.labels.tolist() == [0, 0, 1, 1] and loaded.labels.dtype == torch.int64
    assert [Path(image.path).parent.name for image in loaded.images] == ["zebra", "zebra", "apple", "apple"]
    text = support.class_embeddings(bundled[0], bundled[2], loaded.prompts)
    assert torch.equal(text, support.class_embeddings(bundled[0], bundled[2], prompts_of(["zebra", "apple"])))


def test_an_image_may_serve_several_classes(bundled: Any, photos: Path) -> None:
    found = retrieve(bundled, photos, per_class=1000)
    assert found.counts.tolist() == [60, 60, 60]


def test_classes_without_a_hit_are_named(bundled: Any, photos: Path) -> None:
    whole = retrieve(bundled, photos, per_class=1)
    scores = [
        (feature @ collection.prompt_embeddings(*bundled[::2], prompts_of([name]))[0].T).max().item()
        for name, feature in zip(NAMES, whole.features, strict=True)
    ]
    least = min(scores)
    empty = NAMES[scores.index(least)]
    with pytest.raises(ValueError, match=f"expected an image with a score of at least .* got none for '{empty}'$"):
        retrieve(bundled, photos, minimum=least + 1e-4)
    assert retrieve(bundled, photos, minimum=least - 1e-4).counts.min() == 1


def test_files_with_the_same_content_count_once(bundled: Any, photos: Path) -> None:
    before = names(retrieve(bundled, photos, per_class=5))
    for path in list(photos.rglob("*.png")):
        shutil.copy(path, photos / "2" / f"z{path.name}")
    assert names(retrieve(bundled, photos, per_class=5)) == before


def test_files_that_are_no_image_are_reported_and_the_others_still_serve(bundled: Any, photos: Path) -> None:
    before = names(retrieve(bundled, photos, per_class=60))
    (photos / "broken.png").write_bytes((photos / "0" / "00.png").read_bytes()[:99])
    (photos / "text.jpg").write_text("no image")
    (photos / "notes.txt").write_text("not tried")
    lines: list[str] = []
    found = retrieve(bundled, photos, per_class=60, report=lines.append)
    assert names(found) == before
    assert [line.split(": ")[:2] for line in lines] == [
        ["no image", str(photos / "broken.png")],
        ["no image", str(photos / "text.jpg")],
    ]
    with pytest.warns(UserWarning, match=r"no image: .*broken"):
        retrieve(bundled, photos)


def test_a_collection_is_encoded_once(bundled: Any, photos: Path, encoded: list[int]) -> None:
    first = retrieve(bundled, photos, batch_size=16)
    assert encoded == [16, 16, 16, 12]
    (file,) = photos.parent.glob("photos.*.safetensors")
    again = [
        retrieve(bundled, photos),
        retrieve(bundled, photos, cache=file),
        retrieve(bundled, file),
        retrieve(bundled, shutil.copy(file, photos.parent / "saved")),
    ]
    assert len(encoded) == 4
    for each in again:
        assert torch.equal(each.features, first.features) and each.images == first.images
    assert sorted(path.name for path in photos.parent.iterdir()) == sorted(["photos", file.name, "saved"])


def test_only_what_is_new_or_changed_is_encoded(bundled: Any, photos: Path, encoded: list[int]) -> None:
    retrieve(bundled, photos)
    (photos / "0" / "00.png").unlink()
    (photos / "1" / "01.png").rename(photos / "2" / "moved.png")
    Image.new("RGB", (40, 40), "red").save(photos / "2" / "02.png")
    Image.new("RGB", (40, 40), "blue").save(photos / "new.png")
    del encoded[:]
    found = retrieve(bundled, photos, per_class=1000)
    assert encoded == [2]
    assert found.counts.tolist() == [60, 60, 60]
    assert not any(image.path.endswith("00.png") for image in found.images)


def test_a_stopped_run_goes_on_with_the_same_result(
    bundled: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    whole = retrieve(bundled, photos, cache=photos.parent / "whole", batch_size=8)
    counted = features.encode_image
    del encoded[:]

    def stopped(model: Any, images: Tensor) -> Any:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return counted(model, images)

    monkeypatch.setattr(features, "encode_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        retrieve(bundled, photos, cache=photos.parent / "parts", batch_size=8)
    assert encoded == [8, 8, 8]
    monkeypatch.setattr(features, "encode_image", counted)
    found = retrieve(bundled, photos, cache=photos.parent / "parts", batch_size=8)
    assert encoded == [8, 8, 8, 8, 8, 8, 8, 4]
    assert torch.equal(found.features, whole.features)
    assert (photos.parent / "parts").read_bytes() == (photos.parent / "whole").read_bytes()
    assert sorted(path.name for path in photos.parent.iterdir()) == ["parts", "photos", "whole"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_run_loses_nothing(bundled: Any, photos: Path, encoded: list[int]) -> None:
    code = f"""
import os, signal
import clipkernels as ck
from clipkernels import support
from clipkernels.support import features
encode_image, done = features.encode_image, []
def killed(model, images):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return encode_image(model, images)
features.encode_image = killed
support.retrieve(*ck.bundled(), support.photo(["one"]), {str(photos)!r}, batch_size=16)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = retrieve(bundled, photos, batch_size=16)
    assert encoded == [12]
    assert torch.equal(found.features, retrieve(bundled, photos, cache=photos.parent / "whole", batch_size=16).features)


def test_progress_says_what_is_done(bundled: Any, photos: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    retrieve(bundled, photos, progress=lambda *step: seen.append(step))
    assert seen == [("encoding", done, 60) for done in range(1, 61)] + [("retrieving", done, 3) for done in (1, 2, 3)]


def test_a_method_or_preprocessing_of_ones_own_has_its_own_features(
    tiny: Any, bundled: Any, photos: Path, encoded: list[int]
) -> None:
    plain = retrieve(bundled, photos)
    ck.patch(tiny, ck.EViT(0.5))
    pruned = support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos)
    assert len(encoded) == 2 and not torch.equal(plain.features, pruned.features)
    ck.patch(tiny, ck.Dense())
    dense = support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos)
    assert len(encoded) == 2 and torch.equal(plain.features, dense.features)
    (file, _) = sorted(
        photos.parent.glob("*.safetensors"), key=lambda path: "EViT" in read_tensors(path)[1]["clipkernels"]
    )
    ck.patch(tiny, ck.EViT(0.5))
    with pytest.raises(ValueError, match=r"by this tower, method and preprocessing, got .* of others"):
        support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos, cache=file)


def test_the_features_of_one_folder_are_not_overwritten_with_those_of_another(bundled: Any, photos: Path) -> None:
    cache = photos.parent / "cache"
    retrieve(bundled, photos, cache=cache)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match=r"expected features of .*1 by this tower.* of others: name another file"):
        retrieve(bundled, photos / "1", cache=cache)
    assert cache.read_bytes() == before


def test_a_file_of_other_features_is_no_collection(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected the features of a collection, got .*features.safetensors"):
        retrieve(bundled, tmp_path / "set" / "features.safetensors")


def test_saved_features_of_another_tower_are_refused(bundled: Any, photos: Path, tiny: Any) -> None:
    retrieve(bundled, photos, name="bundled")
    (file,) = photos.parent.glob("photos.*.safetensors")
    with torch.no_grad():
        tiny.visual.proj.add_(0.01)
    with pytest.raises(ValueError, match=r"expected the tower of .*photos.*bundled, no tag; .* got another one"):
        support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class must be a positive int, got 0"),
        ({"minimum": 2.0}, "minimum must be a cosine, from -1 to 1, got 2.0"),
        ({"minimum": float("nan")}, "minimum must be a cosine"),
        ({"collection": "gone"}, "got gone, which is not there"),
        ({"collection": __file__}, "expected a safetensors file, got"),
        ({"collection": __file__, "cache": "x"}, "expected a folder of images with cache, got the file"),
    ],
)
def test_wrong_arguments_of_retrieve_are_one_line(
    bundled: Any, photos: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        retrieve(bundled, **{"photos": options.pop("collection", photos), **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_images_is_refused(bundled: Any, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a collection with images, got none in"):
        retrieve(bundled, tmp_path / "empty")


def test_without_faiss_the_extra_is_named_before_anything_is_done(
    bundled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install clipkernels\[support\]"):
        retrieve(bundled, tmp_path)
    assert list(tmp_path.iterdir()) == []


# On disk


def test_a_set_comes_back_as_it_was_saved(bundled: Any, photos: Path, tmp_path: Path) -> None:
    found = retrieve(bundled, photos, per_class=4, name="bundled", pretrained="none")
    found.save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert torch.equal(loaded.features, found.features) and torch.equal(loaded.labels, found.labels)
    assert (loaded.classes, loaded.prompts, loaded.about) == (found.classes, found.prompts, found.about)
    assert [image.sha256 for image in loaded.images] == [image.sha256 for image in found.images]
    for copy, image in zip(loaded.images, found.images, strict=True):
        assert Path(copy.path).read_bytes() == Path(image.path).read_bytes()
    assert (loaded.about["kind"], loaded.about["model"], loaded.about["pretrained"]) == ("LC", "bundled", "none")


def test_the_same_set_gives_the_same_files(bundled: Any, photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        retrieve(bundled, photos, per_class=3).save(tmp_path / name)
    retrieve(bundled, photos, per_class=3).save(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_set_that_changes_leaves_none_of_its_old_copies(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, ["nine", *NAMES], per_class=9).save(tmp_path / "set")
    retrieve(bundled, photos, per_class=4).save(tmp_path / "set")
    retrieve(bundled, photos, per_class=4).save(tmp_path / "fresh")
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == sorted(NAMES)


def test_images_of_somebody_else_are_never_touched(bundled: Any, photos: Path, tmp_path: Path) -> None:
    found = retrieve(bundled, photos, per_class=2)
    found.save(tmp_path / "set")
    mine = tmp_path / "set" / "zero" / "mine.png"
    shutil.copy(photos / "0" / "00.png", mine)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected no images but the set's own in .*zero, got 'mine.png': delete"):
        retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_without_copies_the_manifest_says_where_the_images_are(bundled: Any, photos: Path, tmp_path: Path) -> None:
    found = retrieve(bundled, photos, per_class=2)
    found.save(tmp_path / "set", copy=False)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["features.safetensors", "manifest.json"]
    assert SupportSet.load(tmp_path / "set", bundled[0]).images == found.images
    with pytest.raises(ValueError, match="expected a support set with copies of its images"):
        support.refresh(tmp_path / "set", *bundled[:2])


def test_an_image_that_changed_since_it_was_encoded_is_not_copied(bundled: Any, photos: Path, tmp_path: Path) -> None:
    found = retrieve(bundled, photos, per_class=2)
    Image.new("RGB", (9, 9)).save(found.images[3].path)
    with pytest.raises(ValueError, match=r"as it was encoded, SHA-256 .* encode it again"):
        found.save(tmp_path / "set")


def test_a_save_that_is_stopped_can_be_taken_up(
    bundled: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkernels.support import store

    found, copied = retrieve(bundled, photos, per_class=4), []
    copy_image = store.copy_image

    def stopped(*arguments: Any) -> None:
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(arguments)
        copy_image(*arguments)

    monkeypatch.setattr(store, "copy_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        found.save(tmp_path / "set")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"expected a support set, got .* without manifest.json"):
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
    with pytest.raises(ValueError, match=r"expected the tower of .*set \(bundled, no tag; float32 .* got another one"):
        SupportSet.load(tmp_path / "set", tiny)
    with pytest.raises(ValueError, match="got another one"):
        support.refresh(tmp_path / "set", tiny, bundled[1])


@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5), ck.ToMe(4)])
def test_a_patched_tower_is_the_same_tower(
    method: ck.Method, bundled: Any, photos: Path, tmp_path: Path, tiny: Any
) -> None:
    found = retrieve(bundled, photos, per_class=2)
    found.save(tmp_path / "set")
    ck.patch(tiny, method)
    assert features.fingerprint(tiny) == features.fingerprint(bundled[0])
    assert torch.equal(SupportSet.load(tmp_path / "set", tiny).features, found.features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_towers_are_compared_in_the_lower_of_their_precisions(
    dtype: torch.dtype, photos: Path, tmp_path: Path, tiny: Any, bundled: Any
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.add_(1e-4 * torch.randn_like(weight))  # beyond what the bundled weights' fp16 holds
    kinds = {name: support.photo(["one"]) for name in ("wide", "narrow")}
    support.retrieve(tiny, *bundled[1:], kinds["wide"], photos, per_class=2).save(tmp_path / "wide")
    wide = features.fingerprint(tiny)
    tiny.to(dtype)
    narrow = features.fingerprint(tiny)
    assert len(wide) > len(narrow) and features.same_tower(wide, narrow)
    assert SupportSet.load(tmp_path / "wide", tiny).features.dtype == torch.float32
    with torch.no_grad():
        tiny.visual.conv1.weight[0, 0, 0, 0] += 1
    assert not features.same_tower(wide, features.fingerprint(tiny))


def test_half_towers_of_different_kinds_cannot_be_compared() -> None:
    assert not features.same_tower({"float16": "a"}, {"bfloat16": "a"})
    assert not features.same_tower({}, {})


def test_the_text_tower_does_not_count(bundled: Any, tiny: Any) -> None:
    with torch.no_grad():
        tiny.text_projection.add_(1)
    assert features.fingerprint(tiny) == features.fingerprint(bundled[0])


def test_a_compiled_model_is_the_same_tower(bundled: Any) -> None:
    compiled = torch.nn.Module()
    compiled._orig_mod = bundled[0]  # as torch.compile holds it
    assert features.fingerprint(compiled) == features.fingerprint(bundled[0])


def test_altered_features_are_refused(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=2).save(tmp_path / "set")
    file = tmp_path / "set" / "features.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "features": tensors["features"].flip(0)}, file)
    with pytest.raises(ValueError, match=r"expected SHA-256 \w{64} of .*features.safetensors, got \w{64}: build it"):
        SupportSet.load(tmp_path / "set", bundled[0])
    file.unlink()
    with pytest.raises(ValueError, match="got no file: build it again"):
        SupportSet.load(tmp_path / "set", bundled[0])


def test_images_that_were_added_or_removed_must_be_taken_up_first(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    shutil.copy(photos / "0" / "00.png", tmp_path / "set" / "zero" / "mine.png")
    for path in sorted((tmp_path / "set" / "three").iterdir())[:2]:
        path.unlink()
    with pytest.raises(ValueError, match=r"expected the 9 images of the manifest in .* got 1 more and 2 fewer"):
        SupportSet.load(tmp_path / "set", bundled[0])
    for name in NAMES:
        shutil.rmtree(tmp_path / "set" / name)
    assert len(SupportSet.load(tmp_path / "set", bundled[0]).features) == 9


def test_a_refresh_encodes_only_what_is_new(bundled: Any, photos: Path, tmp_path: Path, encoded: list[int]) -> None:
    found = retrieve(bundled, photos, per_class=3)
    found.save(tmp_path / "set")
    del encoded[:]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "set" / "zero" / "mine.png")
    min((tmp_path / "set" / "three").iterdir()).unlink()
    fresh = support.refresh(tmp_path / "set", *bundled[:2])
    assert encoded == [1]
    assert fresh.counts.tolist() == [3, 4, 2]
    assert torch.equal(fresh.features[:6], found.features[:6]) and torch.equal(fresh.features[7:], found.features[7:])
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert torch.equal(loaded.features, fresh.features) and loaded.about == found.about
    again = support.refresh(tmp_path / "set", *bundled[:2])
    assert encoded == [1] and torch.equal(again.features, fresh.features)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    sources = [image.get("source") for image in manifest["classes"][1]["images"]]
    assert sources == [*(image.path for image in found.images[3:6]), None]


def test_a_refresh_names_classes_that_are_left_without_images(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=3).save(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "three")
    with pytest.raises(ValueError, match="expected an image in the folder of every class, got none for 'three'"):
        support.refresh(tmp_path / "set", *bundled[:2])
    (tmp_path / "set" / "three").mkdir()
    (tmp_path / "set" / "three" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got '.*text.png': delete"):
        support.refresh(tmp_path / "set", *bundled[:2], report=lambda line: None)


def test_class_names_that_are_no_file_names_get_folders_of_their_own(
    bundled: Any, photos: Path, tmp_path: Path
) -> None:
    classes = ["a/b", "a_b", "Apple", "apple", "..", "żółw 龟", " /", "con", "x" * 300, "a:b", "tail.", "-rf"]
    classes += ["Manifest.json", ".hidden", "line\nbreak"]
    found = folders.folder_names(classes)
    assert len({name.casefold() for name in found}) == len(classes)
    assert all(Path(name).name == name and len(name) < 100 and name[0] not in ".-" for name in found)
    assert (found[1], found[5]) == ("a_b", "żółw 龟")
    retrieve(bundled, photos, classes, per_class=1).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert list(loaded.classes) == classes
    assert [Path(image.path).parent for image in loaded.images] == [tmp_path / "set" / name for name in found]
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == sorted(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format="other.2"), "with format 'other.2'"),
        (lambda manifest: manifest.pop("tower"), "with 'tower'"),
        (lambda manifest: manifest["classes"][0].update(folder=".."), "with the name '..'"),
        (lambda manifest: manifest["classes"][0]["images"][0].update(file="../x.png"), "with the name '../x.png'"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    change: Callable[[Any], Any], message: str, bundled: Any, photos: Path, tmp_path: Path
) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="expected the manifest of a support set, got") as caught:
        SupportSet.load(tmp_path / "set", bundled[0])
    assert message in str(caught.value)


def test_a_retrieved_set_helps_tip_adapter(bundled: Any, photos: Path) -> None:
    found = retrieve(bundled, photos, list(digits.CLASSES), per_class=2)
    text = support.class_embeddings(bundled[0], bundled[2], found.prompts)
    head = ck.TipAdapter(text, found.features, found.labels)
    logits = head(found.features)
    assert logits.shape == (20, 10) and logits.isfinite().all()


# Generation


class Spy:
    """A pipeline that notes how it is called, and flags the calls it is told to."""

    def __init__(self, pipeline: Any, flagged: Callable[[int], bool] = lambda call: False) -> None:
        self.pipeline, self.components, self.flagged = pipeline, pipeline.components, flagged
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> Any:
        seeds = [generator.initial_seed() for generator in arguments["generator"]]
        self.calls.append({**arguments, "generator": seeds})
        images = self.pipeline(**arguments).images
        return SimpleNamespace(images=images, nsfw_content_detected=[self.flagged(seed) for seed in seeds])

    @property
    def seeds(self) -> list[int]:
        return [seed for call in self.calls for seed in call["generator"]]


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Stable Diffusion pipeline of a few thousand random weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|pad|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)} | {"<|endoftext|>": 63}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=77
    )
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            **shape,
        )
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **shape
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=63,
                pad_token_id=1,
            )
        )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline


SAID = {"zebra": ["a zebra.", "some stripes.", "an animal."], "apple": ["a fruit."]}
FEW = {"per_class": 4, "steps": 2}


def generate(bundled: Any, pipeline: Any, folder: Path, **options: Any) -> SupportSet:
    return support.generate(bundled[0], bundled[1], SAID, pipeline, folder, **{**FEW, **options})


def test_the_published_settings_are_the_defaults(bundled: Any, stable: Any, tmp_path: Path) -> None:
    spy = Spy(stable)
    found = support.generate(*bundled[:2], {"apple": ["a fruit."]}, spy, tmp_path / "set", per_class=1)
    assert (spy.calls[0]["guidance_scale"], spy.calls[0]["num_inference_steps"]) == (9.5, 85)
    assert found.about["settings"].items() >= {"guidance": 9.5, "steps": 85, "per_class": 1}.items()
    assert support.generate.__kwdefaults__ is not None and support.generate.__kwdefaults__["per_class"] == 100


def test_prompts_take_turns_and_every_image_has_a_seed_of_its_own(bundled: Any, stable: Any, tmp_path: Path) -> None:
    spy = Spy(stable)
    generate(bundled, spy, tmp_path / "set", guidance=3.0)
    assert [call["prompt"] for call in spy.calls] == [
        *(["a zebra."], ["some stripes."], ["an animal."], ["a zebra."]),
        *4 * (["a fruit."],),
    ]
    assert {call["guidance_scale"] for call in spy.calls} == {3.0}
    assert {call["num_inference_steps"] for call in spy.calls} == {2}
    assert len(set(spy.seeds)) == 8
    again = Spy(stable)
    generate(bundled, again, tmp_path / "other", seed=1)
    assert not set(again.seeds) & set(spy.seeds)


def test_generated_images_are_those_of_the_pipeline(bundled: Any, stable: Any, tmp_path: Path) -> None:
    spy = Spy(stable)
    found = generate(bundled, spy, tmp_path / "set")
    noise = torch.Generator().manual_seed(spy.seeds[1])
    (expected,) = stable(prompt=["some stripes."], guidance_scale=9.5, num_inference_steps=2, generator=[noise]).images
    with Image.open(tmp_path / "set" / "zebra" / "0001.png") as image:
        assert image.tobytes() == expected.tobytes()
        recipe = json.loads(image.info["clipkernels"])
    assert recipe.items() >= {"prompt": "some stripes.", "index": 1, "seed": 0, "attempt": 0}.items()
    assert names(found) == 2 * [["0000.png", "0001.png", "0002.png", "0003.png"]]
    with torch.no_grad():
        images = torch.stack([bundled[1](Image.open(image.path)) for image in found.images])
        torch.testing.assert_close(found.features, normalize(bundled[0].encode_image(images), dim=1))


def test_a_generated_set_is_saved_and_loads(bundled: Any, stable: Any, tmp_path: Path) -> None:
    found = generate(bundled, stable, tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.about["kind"] == "SD" and loaded.classes == ("zebra", "apple")
    assert torch.equal(loaded.features, found.features) and loaded.labels.tolist() == 4 * [0] + 4 * [1]


def test_a_stopped_generation_makes_nothing_twice_and_gives_identical_files(
    bundled: Any, stable: Any, tmp_path: Path, encoded: list[int]
) -> None:
    whole = Spy(stable)
    generate(bundled, whole, tmp_path / "whole")

    def stop(seed: int) -> bool:
        if len(first.calls) == 6:
            raise KeyboardInterrupt
        return False

    first, second = Spy(stable, stop), Spy(stable)
    with pytest.raises(KeyboardInterrupt):
        generate(bundled, first, tmp_path / "set")
    assert len(list((tmp_path / "set").rglob("*.png"))) == 5
    generate(bundled, second, tmp_path / "set")
    assert first.seeds[:5] + second.seeds == whole.seeds
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    third = Spy(stable)
    del encoded[:]
    generate(bundled, third, tmp_path / "set")
    assert third.calls == [] and encoded == []
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_more_images_per_class_keep_those_there_are(bundled: Any, stable: Any, tmp_path: Path) -> None:
    generate(bundled, stable, tmp_path / "set", per_class=2)
    spy = Spy(stable)
    generate(bundled, spy, tmp_path / "set")
    generate(bundled, stable, tmp_path / "whole")
    assert len(spy.calls) == 4
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"expected no images but the set's own in .*, got '0003.png': delete"):
        generate(bundled, spy, tmp_path / "set", per_class=3)


def test_several_images_per_call_are_the_same_images(bundled: Any, stable: Any, tmp_path: Path) -> None:
    one, three = Spy(stable), Spy(stable)
    generate(bundled, one, tmp_path / "one")
    generate(bundled, three, tmp_path / "three", images_per_call=3)
    assert [len(call["prompt"]) for call in three.calls] == [3, 1, 3, 1]
    assert three.seeds == one.seeds
    for path in (tmp_path / "one").rglob("*.png"):
        both = [
            Image.open(folder / path.relative_to(tmp_path / "one")) for folder in (path.parents[1], tmp_path / "three")
        ]
        ours, theirs = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in both)
        assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("change", [{"guidance": 3.0}, {"steps": 3}, {"seed": 1}, {"prompts": {"zebra": ["a horse."]}}])
def test_a_folder_of_images_made_in_another_way_is_refused(
    change: dict[str, Any], bundled: Any, stable: Any, tmp_path: Path
) -> None:
    generate(bundled, stable, tmp_path / "set")
    before, spy = contents(tmp_path / "set"), Spy(stable)
    prompts = change.pop("prompts", SAID)
    what = next(iter(change), "prompt")
    with pytest.raises(ValueError, match=f"expected .*0000.png to be made with {what} .* choose another folder"):
        support.generate(*bundled[:2], prompts, spy, tmp_path / "set", **{**FEW, **change})
    assert spy.calls == [] and contents(tmp_path / "set") == before


def test_images_of_another_pipeline_or_of_none_are_refused(bundled: Any, stable: Any, tmp_path: Path) -> None:
    generate(bundled, stable, tmp_path / "set")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    components = {**stable.components, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    other = diffusers.StableDiffusionPipeline(**components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="to be made with pipeline"):
        generate(bundled, other, tmp_path / "set")
    shutil.copy(tmp_path / "set" / "apple" / "0001.png", tmp_path / "set" / "apple" / "0000.png")
    with pytest.raises(ValueError, match="to be made with index 0, got 1"):
        generate(bundled, stable, tmp_path / "set")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "apple" / "0000.png")
    with pytest.raises(ValueError, match=r"expected an image that was generated here, got .*0000.png"):
        generate(bundled, stable, tmp_path / "set")


def test_a_flagged_image_is_tried_again_from_other_noise(bundled: Any, stable: Any, tmp_path: Path) -> None:
    plain = Spy(stable)
    generate(bundled, plain, tmp_path / "plain")
    bad = plain.seeds[2]
    spy = Spy(stable, lambda seed: seed == bad)
    found = generate(bundled, spy, tmp_path / "set")
    assert len(spy.calls) == 9 and spy.calls[3]["prompt"] == ["an animal."] and spy.seeds[3] not in plain.seeds
    assert found.counts.tolist() == [4, 4]
    assert json.loads(Image.open(tmp_path / "set" / "zebra" / "0002.png").info["clipkernels"])["attempt"] == 1
    again = Spy(stable)
    generate(bundled, again, tmp_path / "set")
    assert again.calls == []


def test_an_image_that_stays_flagged_is_reported_and_left_out(bundled: Any, stable: Any, tmp_path: Path) -> None:
    plain = Spy(stable)
    generate(bundled, plain, tmp_path / "plain")
    bad = {diffusion._seed(0, "apple", 1, attempt) for attempt in range(3)}
    assert plain.seeds[5] in bad
    lines: list[str] = []
    spy = Spy(stable, lambda seed: seed in bad)
    found = generate(bundled, spy, tmp_path / "set", retries=2, report=lines.append)
    assert lines == ["no image 1 of 'apple': flagged 3 times"]
    assert names(found)[1] == ["0000.png", "0002.png", "0003.png"] and len(spy.calls) == 10
    again = Spy(stable, lambda seed: seed in bad)
    generate(bundled, again, tmp_path / "set", retries=2)
    assert again.calls == []
    more = Spy(stable, lambda seed: seed in bad)
    assert generate(bundled, more, tmp_path / "set", retries=3).counts.tolist() == [4, 4]


def test_a_class_whose_images_are_all_flagged_is_named(bundled: Any, stable: Any, tmp_path: Path) -> None:
    apples = {diffusion._seed(0, "apple", index, attempt) for index in range(4) for attempt in range(2)}
    spy = Spy(stable, lambda seed: seed in apples)
    with pytest.raises(ValueError, match="expected an image that is not flagged of every class, got none for 'apple'"):
        generate(bundled, spy, tmp_path / "set", retries=1, report=lambda line: None)


def test_a_set_of_another_kind_is_not_overwritten(bundled: Any, stable: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected a support set of kind SD in .*set, got LC"):
        generate(bundled, stable, tmp_path / "set")
    generate(bundled, stable, tmp_path / "made")
    before = contents(tmp_path / "made")
    with pytest.raises(ValueError, match=r"expected a support set of kind LC in .*made, got SD"):
        retrieve(bundled, photos, per_class=1).save(tmp_path / "made")
    assert contents(tmp_path / "made") == before


def test_the_same_images_serve_another_tower_once_they_are_encoded_again(
    bundled: Any, stable: Any, tmp_path: Path, tiny: Any, encoded: list[int]
) -> None:
    generate(bundled, stable, tmp_path / "set")
    with torch.no_grad():
        tiny.visual.proj.mul_(-1)
    spy = Spy(stable)
    del encoded[:]
    found = support.generate(tiny, bundled[1], SAID, spy, tmp_path / "set", **FEW)
    assert spy.calls == [] and encoded == [8]
    torch.testing.assert_close(found.features, SupportSet.load(tmp_path / "set", tiny).features)
    with pytest.raises(ValueError, match="got another one"):
        SupportSet.load(tmp_path / "set", bundled[0])


def test_a_pipeline_is_loaded_from_a_folder_of_safetensors(bundled: Any, stable: Any, tmp_path: Path) -> None:
    stable.save_pretrained(tmp_path / "pipeline")
    loaded = support.load_pipeline(tmp_path / "pipeline")
    assert diffusion._identity(loaded) == diffusion._identity(stable)
    generate(bundled, tmp_path / "pipeline", tmp_path / "set", per_class=1)
    generate(bundled, stable, tmp_path / "same", per_class=1)
    found = SupportSet.load(tmp_path / "set", bundled[0])
    assert found.about["settings"]["source"] == str(tmp_path / "pipeline")
    ours, same = (contents(tmp_path / name) for name in ("set", "same"))
    assert ours.pop("manifest.json") != same.pop("manifest.json")  # which names the pipeline's folder
    assert ours == same


def test_a_pipeline_that_would_be_unpickled_is_refused(stable: Any, tmp_path: Path) -> None:
    stable.save_pretrained(tmp_path / "pipeline")
    weights = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        support.load_pipeline(tmp_path / "pipeline")


def test_without_diffusers_the_extra_is_named(bundled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install clipkernels\[diffusion\]"):
        generate(bundled, "somebody/something", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class must be a positive int, got 0"),
        ({"steps": 1.5}, "steps must be a positive int, got 1.5"),
        ({"images_per_call": 0}, "images_per_call must be a positive int, got 0"),
        ({"retries": -1}, "retries must be an int of at least 0, got -1"),
    ],
)
def test_wrong_arguments_of_generate_are_one_line(
    bundled: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(bundled, None, tmp_path / "set", **options)


# What others rely on


def test_features_that_are_not_finite_are_reported(tiny: Any, bundled: Any, photos: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return bundled[1](image) * (float("nan") if image.size == (9, 9) else 1)

    Image.new("RGB", (9, 9)).save(photos / "bad.png")
    lines: list[str] = []
    prompts = support.photo(["one"])
    found = support.retrieve(tiny, preprocess, bundled[2], prompts, photos, per_class=99, report=lines.append)
    assert len(found.images) == 60 and found.features.isfinite().all()
    assert lines == [f"no features: {photos / 'bad.png'}: the model gives numbers that are not finite"]


def test_a_model_is_left_in_its_mode(tiny: Any, bundled: Any, photos: Path) -> None:
    tiny.train()
    tiny.visual.eval()
    before = [module.training for module in tiny.modules()]
    found = support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos)
    assert [module.training for module in tiny.modules()] == before
    assert torch.equal(found.features, retrieve(bundled, photos, cache=photos.parent / "other").features)


def test_an_open_clip_resnet_encodes_too(bundled: Any, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"context_length": 64, "vocab_size": 259, "width": 64, "heads": 1, "layers": 1}
    model: Any = open_clip.CLIP(32, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, text).eval()
    support.retrieve(model, *bundled[1:], prompts_of(NAMES), photos, per_class=2).save(tmp_path / "set")
    assert SupportSet.load(tmp_path / "set", model).features.shape == (6, 32)


def test_an_image_with_other_metadata_is_another_file_with_the_same_features(bundled: Any, photos: Path) -> None:
    info = PngInfo()
    info.add_text("by", "somebody")
    with Image.open(photos / "0" / "00.png") as image:
        image.save(photos / "0" / "00b.png", pnginfo=info)
    found = retrieve(bundled, photos, per_class=99)
    twins = [row for row, image in enumerate(found.images) if Path(image.path).name in ("00.png", "00b.png")][:2]
    torch.testing.assert_close(found.features[twins[0]], found.features[twins[1]])
    assert found.counts.tolist() == [61, 61, 61]
