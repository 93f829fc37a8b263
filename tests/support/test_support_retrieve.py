"""Support sets: retrieval from the user's own images."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels import support
from clipkernels.data import digits
from clipkernels.images import Reader, draw_images, images_below, read_bytes
from clipkernels.support import SupportSet, collection, features, folders
from clipkernels.support.features import read_feature_header
from tests.support.fixtures import NAMES, names, prompts_of, retrieve

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_retrieval_matches_a_literal_argsort(bundled: Any, photos: Path) -> None:
    model, preprocess, tokenizer = bundled
    support_set = retrieve(bundled, photos, per_class=7)
    paths = sorted(photos.rglob("*.png"))
    images = normalize(model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths])), dim=1)
    prompts = prompts_of(NAMES)
    expected = []
    for name in NAMES:
        text = normalize(model.encode_text(tokenizer(prompts[name])), dim=1)
        expected += (images @ text.T).amax(1).argsort(descending=True, stable=True)[:7].tolist()
    assert [image.path for image in support_set.images] == [str(paths[row]) for row in expected]
    assert support_set.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    torch.testing.assert_close(support_set.features, images[expected])
    assert support_set.features.dtype == torch.float32 and not support_set.features.is_inference()


def test_any_number_of_ties_go_to_the_lower_index() -> None:
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


def test_labels_follow_the_order_of_the_prompts_not_of_the_folders(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, ["zebra", "apple"], per_class=2).save(tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.classes == ("zebra", "apple")
    assert loaded.labels.tolist() == [0, 0, 1, 1] and loaded.labels.dtype == torch.int64
    assert [Path(image.path).parent.name for image in loaded.images] == ["zebra", "zebra", "apple", "apple"]
    text = support.class_embeddings(bundled[0], bundled[2], loaded.prompts)
    assert torch.equal(text, support.class_embeddings(bundled[0], bundled[2], prompts_of(["zebra", "apple"])))


def test_an_image_may_represent_several_classes(bundled: Any, photos: Path) -> None:
    support_set = retrieve(bundled, photos, per_class=1000)
    assert support_set.counts.tolist() == [60, 60, 60]


@torch.no_grad()
def test_an_image_represents_the_class_that_scores_it_highest(bundled: Any, photos: Path) -> None:
    model, preprocess, tokenizer = bundled
    paths = sorted(photos.rglob("*.png"))
    images = normalize(model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths])), dim=1)
    prompts = prompts_of(NAMES)
    texts = [normalize(model.encode_text(tokenizer(prompts[name])), dim=1) for name in NAMES]
    scores = torch.stack([(images @ text.T).amax(1) for text in texts], 1)
    expected = []
    for k in range(3):
        own = (scores.argmax(1) == k).nonzero()[:, 0]
        expected.append([paths[row].name for row in own[scores[own, k].argsort(descending=True, stable=True)].tolist()])
    support_set = retrieve(bundled, photos, per_class=60, shared=False)
    assert names(support_set) == expected and sum(map(len, expected)) == 60
    assert names(retrieve(bundled, photos, per_class=4, shared=False)) == [of_class[:4] for of_class in expected]
    assert support_set.about["settings"]["shared"] is False


def test_an_image_between_two_classes_goes_to_the_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = [rows[:2], rows[[0, 2]], rows[[2, 1, 3]]]
    for scores in (2**23, 1):  # one block, and one image per block
        monkeypatch.setattr(collection, "MAX_SCORES", scores)
        assert collection._best_class(rows[:4].repeat(3, 1), texts).tolist() == [0, 0, 1, 2] * 3


def test_a_class_that_wins_no_image_is_an_error_naming_the_way_out(bundled: Any, photos: Path) -> None:
    with pytest.raises(ValueError, match=r"an image for every class, got none for 'b': .* \(--shared\)$"):
        support.retrieve(*bundled, {"a": ["a digit"], "b": ["a digit"]}, photos)


def test_a_larger_limit_adds_to_the_same_draw(bundled: Any, photos: Path, encoded: list[int]) -> None:
    drawn = [{image.path for image in retrieve(bundled, photos, per_class=60, limit=n).images} for n in (10, 25)]
    expected = draw_images([str(path) for path in sorted(photos.rglob("*.png"))], 25, 0)
    assert drawn == [set(expected[:10]), set(expected)] and sum(encoded) == 25
    assert retrieve(bundled, photos, limit=10, seed=1).about["settings"] | {"collection": ""} == {
        **{"collection": "", "per_class": 100, "minimum": None, "shared": True, "limit": 10, "seed": 1}
    }
    with pytest.raises(ValueError, match="limit must be a positive int, got 0"):
        retrieve(bundled, photos, limit=0)


def test_a_limit_keeps_the_features_of_the_other_images(bundled: Any, photos: Path, encoded: list[int]) -> None:
    whole = retrieve(bundled, photos, per_class=60)
    (file,) = photos.parent.glob("photos.*.safetensors")
    (photos / "0" / "00.png").unlink()
    retrieve(bundled, photos, per_class=60, limit=5)
    again = retrieve(bundled, file, per_class=60)
    assert sum(encoded) == 60 and again.counts.tolist() == [59] * 3
    rows = {image.path: feature for image, feature in zip(whole.images, whole.features, strict=True)}
    assert all(torch.equal(rows[x.path], f) for x, f in zip(again.images, again.features, strict=True))
    drawn = {image.path for image in retrieve(bundled, file, per_class=60, limit=7).images}
    assert drawn < {image.path for image in again.images} and len(drawn) == 7


def test_photographs_stored_sideways_are_encoded_upright(bundled: Any, photos: Path, encoded: list[int]) -> None:
    (path,) = photos.rglob("00.png")
    upright = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    before = retrieve(bundled, photos, per_class=60)
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    after = retrieve(bundled, photos, per_class=60)
    assert names(after) == names(before)
    torch.testing.assert_close(after.features, before.features, rtol=0, atol=1e-5)
    count = sum(encoded)
    sideways = retrieve(bundled, photos, per_class=60, exif=False)
    assert sum(encoded) == count + 60, "the reader is part of the key"
    rows = [[Path(image.path).name for image in result.images].index("00.png") for result in (after, sideways)]
    assert (after.features[rows[0]] - sideways.features[rows[1]]).norm() > 0.1
    assert (after.about["reader"], sideways.about["reader"]) == ("1", "1, no EXIF")
    assert len(list(photos.parent.glob("photos.*.safetensors"))) == 2


def test_only_regular_files_are_opened_and_others_are_counted(bundled: Any, photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    (photos / "endless.png").symlink_to("/dev/zero")
    (photos / "notes.txt").write_text("not tried")
    (photos / "phone.heic").write_bytes(b"not really")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(photos / "1", tmp_path / "elsewhere" / "1")
    (photos / "1").symlink_to(tmp_path / "elsewhere" / "1")
    (photos / "1" / "loop").symlink_to(photos)
    os.mkfifo(photos / "manifest.json")
    lines, notes = list[str](), list[str]()
    found = retrieve(bundled, photos, per_class=99, report=lines.append, note=notes.append)
    assert found.counts.tolist() == [60] * 3
    assert lines == [f"skipped {photos / name}: not a regular file" for name in ("endless.png", "pipe.png")]
    assert notes == ["skipped 1 .heic: install pillow-heif; 1 .json, 1 .txt: not images"]


def test_the_error_names_classes_without_a_hit(bundled: Any, photos: Path) -> None:
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


def test_files_that_are_not_images_are_reported_and_skipped(bundled: Any, photos: Path) -> None:
    before = names(retrieve(bundled, photos, per_class=60))
    (photos / "broken.png").write_bytes((photos / "0" / "00.png").read_bytes()[:99])
    (photos / "text.jpg").write_text("no image")
    (photos / "notes.txt").write_text("not tried")
    lines: list[str] = []
    support_set = retrieve(bundled, photos, per_class=60, report=lines.append)
    assert names(support_set) == before
    assert [line.split(": ")[0] for line in lines] == [
        f"skipped {photos / 'broken.png'}",
        f"skipped {photos / 'text.jpg'}",
    ]
    with pytest.warns(UserWarning, match=r"skipped .*broken"):
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
    for repeated in again:
        assert torch.equal(repeated.features, first.features) and repeated.images == first.images
    assert sorted(path.name for path in photos.parent.iterdir()) == sorted(["photos", file.name, "saved"])


def test_only_new_or_changed_images_are_encoded(bundled: Any, photos: Path, encoded: list[int]) -> None:
    retrieve(bundled, photos)
    (photos / "0" / "00.png").unlink()
    (photos / "1" / "01.png").rename(photos / "2" / "moved.png")
    Image.new("RGB", (40, 40), "red").save(photos / "2" / "02.png")
    Image.new("RGB", (40, 40), "blue").save(photos / "new.png")
    del encoded[:]
    support_set = retrieve(bundled, photos, per_class=1000)
    assert encoded == [2]
    assert support_set.counts.tolist() == [60, 60, 60]
    assert not any(image.path.endswith("00.png") for image in support_set.images)


def test_an_interrupted_run_resumes_with_the_same_result(
    bundled: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    expected = retrieve(bundled, photos, cache=photos.parent / "whole", batch_size=8)
    encode_image = features.encode_image
    del encoded[:]

    def interrupted(model: Any, images: Tensor) -> Any:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode_image(model, images)

    monkeypatch.setattr(features, "encode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        retrieve(bundled, photos, cache=photos.parent / "parts", batch_size=8)
    assert encoded == [8, 8, 8]
    monkeypatch.setattr(features, "encode_image", encode_image)
    support_set = retrieve(bundled, photos, cache=photos.parent / "parts", batch_size=8)
    assert encoded == [8, 8, 8, 8, 8, 8, 8, 4]
    assert torch.equal(support_set.features, expected.features)
    assert (photos.parent / "parts").read_bytes() == (photos.parent / "whole").read_bytes()
    assert sorted(path.name for path in photos.parent.iterdir()) == ["parts", "photos", "whole"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_run_loses_nothing(bundled: Any, photos: Path, encoded: list[int]) -> None:
    code = f"""
import os, signal
import torch
import clipkernels as ck
from clipkernels import support
torch.set_num_threads(1)
from clipkernels.support import features
encode_image, calls = features.encode_image, []
def killed(model, images):
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return encode_image(model, images)
features.encode_image = killed
support.retrieve(*ck.bundled(), support.photo(["one"]), {str(photos)!r}, batch_size=16)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    support_set = retrieve(bundled, photos, batch_size=16)
    assert encoded == [12]
    assert torch.equal(
        support_set.features, retrieve(bundled, photos, cache=photos.parent / "whole", batch_size=16).features
    )


def test_progress_reports_stage_and_counts(bundled: Any, photos: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    retrieve(bundled, photos, progress=lambda *step: steps.append(step))
    assert steps == [("encoding", done, 60) for done in range(1, 61)] + [("retrieving", done, 3) for done in (1, 2, 3)]


def test_another_method_or_preprocessing_has_its_own_features(
    tiny: Any, bundled: Any, photos: Path, encoded: list[int]
) -> None:
    plain = retrieve(bundled, photos)
    ck.patch(tiny, ck.EViT(0.5))
    pruned = retrieve((tiny, *bundled[1:]), photos)
    assert len(encoded) == 2 and not torch.equal(plain.features, pruned.features)
    ck.patch(tiny, ck.Dense())
    dense = retrieve((tiny, *bundled[1:]), photos)
    assert len(encoded) == 2 and torch.equal(plain.features, dense.features)
    (file, _) = sorted(
        photos.parent.glob("*.safetensors"),
        key=lambda path: "EViT" in read_feature_header(path)["encoder"]["method"],
    )
    ck.patch(tiny, ck.EViT(0.5))
    with pytest.raises(ValueError, match=r"by this tower, method, preprocessing and reader .* got .* with others"):
        support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos, cache=file)


def test_features_of_another_folder_are_not_overwritten(bundled: Any, photos: Path) -> None:
    cache = photos.parent / "cache"
    retrieve(bundled, photos, cache=cache)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match=r"expected features of .*1 by this tower.* with others: choose another"):
        retrieve(bundled, photos / "1", cache=cache)
    assert cache.read_bytes() == before


def test_a_file_of_other_features_is_refused_as_a_collection(bundled: Any, photos: Path, tmp_path: Path) -> None:
    retrieve(bundled, photos, per_class=1).save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"expected the features of a collection, got .*features.safetensors"):
        retrieve(bundled, tmp_path / "set" / "features.safetensors")


def test_saved_features_of_another_tower_are_refused(bundled: Any, photos: Path, tiny: Any) -> None:
    retrieve(bundled, photos, name="bundled")
    (file,) = photos.parent.glob("photos.*.safetensors")
    with torch.no_grad():
        tiny.visual.proj.add_(0.01)
    with pytest.raises(ValueError, match=r"expected the tower of .*photos.*bundled, no tag; .* got another tower"):
        support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class must be a positive int, got 0"),
        ({"minimum": 2.0}, "minimum must be a cosine, from -1 to 1, got 2.0"),
        ({"minimum": float("nan")}, "minimum must be a cosine"),
        ({"collection": "gone"}, "got gone, which does not exist"),
        ({"collection": __file__}, "expected a safetensors file, got"),
        ({"collection": __file__, "cache": "x"}, "expected a folder of images with cache, got the file"),
    ],
)
def test_wrong_arguments_of_retrieve_are_one_line_errors(
    bundled: Any, photos: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        retrieve(bundled, **{"photos": options.pop("collection", photos), **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_images_is_refused(bundled: Any, digit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a collection with images, got none in"):
        retrieve(bundled, tmp_path / "empty")


def test_without_faiss_the_error_names_the_extra_before_any_work(
    bundled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install clipkernels\[support\]"):
        retrieve(bundled, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_reported(tiny: Any, bundled: Any, photos: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return bundled[1](image) * (float("nan") if image.size == (9, 9) else 1)

    Image.new("RGB", (9, 9)).save(photos / "bad.png")
    lines: list[str] = []
    prompts = support.photo(["one"])
    support_set = support.retrieve(tiny, preprocess, bundled[2], prompts, photos, per_class=99, report=lines.append)
    assert len(support_set.images) == 60 and support_set.features.isfinite().all()
    assert lines == [f"skipped {photos / 'bad.png'}: the model's features are not finite, or zero"]


def test_a_models_training_mode_is_restored(tiny: Any, bundled: Any, photos: Path) -> None:
    tiny.train()
    tiny.visual.eval()
    before = [module.training for module in tiny.modules()]
    support_set = support.retrieve(tiny, *bundled[1:], prompts_of(NAMES), photos, shared=True)
    assert [module.training for module in tiny.modules()] == before
    assert torch.equal(support_set.features, retrieve(bundled, photos, cache=photos.parent / "other").features)


def test_an_open_clip_resnet_encodes_images(bundled: Any, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"context_length": 64, "vocab_size": 259, "width": 64, "heads": 1, "layers": 1}
    model: Any = open_clip.CLIP(32, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, text).eval()
    support.retrieve(model, *bundled[1:], prompts_of(NAMES), photos, per_class=2, shared=True).save(tmp_path / "set")
    assert SupportSet.load(tmp_path / "set", model).features.shape == (6, 32)


def test_other_metadata_makes_another_file_with_equal_features(bundled: Any, photos: Path) -> None:
    info = PngInfo()
    info.add_text("by", "somebody")
    with Image.open(photos / "0" / "00.png") as image:
        image.save(photos / "0" / "00b.png", pnginfo=info)
    support_set = retrieve(bundled, photos, per_class=99)
    twins = [row for row, image in enumerate(support_set.images) if Path(image.path).name in ("00.png", "00b.png")][:2]
    torch.testing.assert_close(support_set.features[twins[0]], support_set.features[twins[1]])
    assert support_set.counts.tolist() == [61, 61, 61]


def test_an_empty_collection_keeps_its_features(bundled: Any, photos: Path) -> None:
    retrieve(bundled, photos)
    (file,) = photos.parent.glob("*.safetensors")
    before = file.read_bytes()
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(ValueError, match="expected a collection with images, got none in"):
        retrieve(bundled, photos)
    assert file.read_bytes() == before


def test_an_unreadable_file_is_skipped_and_its_features_stay(
    bundled: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = retrieve(bundled, photos, per_class=60)
    (file,) = photos.parent.glob("*.safetensors")
    lines: list[str] = []

    def fail(path: str) -> bytes:
        if path.endswith("07.png"):
            raise OSError(5, "Input/output error", path)
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_bytes", fail)
        found = retrieve(bundled, photos, per_class=60, report=lines.append)
    assert lines == [f"skipped {photos / '1' / '07.png'}: Input/output error"]
    assert found.counts.tolist() == [59] * 3
    assert retrieve(bundled, file, per_class=60).images == before.images


def test_features_of_a_file_keep_their_encoder(tiny: Any, bundled: Any, photos: Path) -> None:
    plain = retrieve(bundled, photos, cache=photos.parent / "cache")
    ck.patch(tiny, ck.EViT(0.5))

    def other(image: Image.Image) -> Tensor:
        return bundled[1](image.rotate(90))

    support_set = retrieve((tiny, other, bundled[2]), photos.parent / "cache")
    assert support_set.about == {**plain.about, "settings": support_set.about["settings"]}
    assert torch.equal(support_set.features, plain.features)


def test_preprocessings_with_equal_reprs_have_their_own_features(bundled: Any, photos: Path) -> None:
    def turned(angle: int) -> Any:
        def preprocess(image: Image.Image) -> Tensor:
            return bundled[1](image.rotate(angle))

        return preprocess

    one, other = turned(0), turned(90)
    first, second = (
        support.retrieve(bundled[0], each, bundled[2], prompts_of(NAMES), photos, per_class=60, shared=True)
        for each in (one, other)
    )
    assert not torch.equal(first.features, second.features)
    assert len(list(photos.parent.glob("*.safetensors"))) == 2


def test_a_random_preprocessing_is_refused(bundled: Any, photos: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return bundled[1](image) + torch.rand(())

    with pytest.raises(ValueError, match="preprocess must be deterministic, got two different tensors"):
        support.retrieve(bundled[0], preprocess, bundled[2], prompts_of(NAMES), photos)


def test_text_embeddings_that_are_not_finite_are_refused(tiny: Any, bundled: Any, photos: Path) -> None:
    encode_text = tiny.encode_text

    def broken(tokens: Tensor) -> Tensor:
        rows = encode_text(tokens)
        rows[len(digits.TEMPLATES) :] = float("nan")
        return rows

    tiny.encode_text = broken
    with pytest.raises(ValueError, match="expected finite text embeddings, got infinite or NaN values for 'zero'"):
        support.retrieve(tiny, *bundled[1:], prompts_of(["seven", "zero"]), photos)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_open_clips_half_precision_tower_encodes(dtype: torch.dtype, tiny: Any, bundled: Any, photos: Path) -> None:
    open_clip.model.convert_weights_to_lp(tiny, dtype)
    assert next(tiny.parameters()).dtype == torch.float32
    who = features.encoder_of(tiny, bundled[1], Reader())
    paths = [str(path) for path in sorted(photos.rglob("*.png"))[:3]]
    dtypes: list[torch.dtype] = []
    tiny.visual.conv1.register_forward_pre_hook(lambda module, arguments: dtypes.append(arguments[0].dtype))
    encoding = features.encode(
        tiny, bundled[1], who, paths, photos.parent / "cache", batch_size=3, progress=None, report=print
    )
    assert dtypes == [dtype] and encoding.features.shape[0] == 3


@pytest.mark.parametrize("hidden", [".thumbnails/small.png", "0/.git/deep/small.png", ".small.png"])
def test_hidden_files_are_not_retrieved(hidden: str, photos: Path) -> None:
    before = images_below(str(photos), folders.holds_set)
    (photos / hidden).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(photos / "0" / "00.png", photos / hidden)
    assert images_below(str(photos), folders.holds_set) == before and len(before.paths) == 60


def test_features_on_another_drive_store_the_absolute_path(
    bundled: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relpath = os.path.relpath

    def other(path: Any, start: Any) -> str:
        if Path(start) == photos.parent:
            raise ValueError("path is on mount 'C:', start on mount 'D:'")
        return relpath(path, start)

    monkeypatch.setattr(os.path, "relpath", other)
    support_set = retrieve(bundled, photos, cache=photos.parent / "cache")
    assert read_feature_header(photos.parent / "cache")["folder"] == str(photos)
    assert retrieve(bundled, photos.parent / "cache").images == support_set.images


def test_a_collection_without_a_writable_parent_needs_a_cache(
    bundled: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"expected cache \(--cache\) for /, got none"):
        retrieve(bundled, Path(photos.anchor))
    with pytest.raises(ValueError, match=r"expected cache \(--cache\) to be a file, got the folder"):
        retrieve(bundled, photos, cache=photos.parent)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"expected cache \(--cache\) for .*photos, got none: .* cannot be written"):
        retrieve(bundled, photos)


def test_an_image_that_the_preprocessing_rejects_is_reported(bundled: Any, photos: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        if image.size == (9, 9):
            raise RuntimeError("smaller than\nthe crop")
        return bundled[1](image)

    Image.new("RGB", (9, 9)).save(photos / "small.png")
    lines: list[str] = []
    support_set = support.retrieve(
        bundled[0], preprocess, bundled[2], prompts_of(["one"]), photos, per_class=99, report=lines.append
    )
    assert len(support_set.images) == 60
    assert lines == [f"skipped {photos / 'small.png'}: preprocessing failed (smaller than the crop)"]


def test_unchanged_features_are_not_written_again(bundled: Any, photos: Path) -> None:
    retrieve(bundled, photos)
    (file,) = photos.parent.glob("*.safetensors")
    before = file.stat()
    retrieve(bundled, photos)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (photos / "0" / "00.png").rename(photos / "0" / "99.png")
    retrieve(bundled, photos)
    names = retrieve(bundled, file, per_class=60).images
    assert str(photos / "0" / "99.png") in [image.path for image in names]


@pytest.mark.parametrize("array", [False, True])
def test_precomputed_features_are_a_collection(array: bool, bundled: Any, photos: Path, tmp_path: Path) -> None:
    full_set = retrieve(bundled, photos, per_class=60)
    rows, paths = full_set.features[:60], [image.path for image in full_set.images[:60]]
    collection_features: Any = (3 * rows).numpy() if array else 3 * rows
    support_set = retrieve(bundled, (collection_features, paths), per_class=5)
    expected = retrieve(bundled, photos, per_class=5)
    assert support_set.images == expected.images
    torch.testing.assert_close(support_set.features, expected.features)
    assert (support_set.about["method"], support_set.about["preprocess"]) == ("given", "given")
    support_set.save(tmp_path / "set")
    assert torch.equal(SupportSet.load(tmp_path / "set", bundled[0]).features, support_set.features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, paths: (rows[:, :-1], paths), r"expected features \(n,\d+\) of this model, got \(3, \d+\)"),
        (lambda rows, paths: (rows, paths[1:]), r"expected floating-point features \(n,E\) of 2 files, got \(3,"),
        (lambda rows, paths: (rows.int(), paths), r"got \(3, \d+\) torch.int32"),
        (lambda rows, paths: (rows / 0, paths), "expected finite features, got infinite or NaN"),
        (lambda rows, paths: (rows, [paths[0], *paths[:2]]), "expected distinct files, got 1 repeated"),
        (lambda rows, paths: (rows[:0], []), "expected a collection with images, got none in features in memory"),
    ],
)
def test_precomputed_features_that_do_not_fit_are_refused(
    change: Any, message: str, bundled: Any, photos: Path
) -> None:
    valid_set = retrieve(bundled, photos, ["one"], per_class=3)
    with pytest.raises(ValueError, match=message):
        retrieve(bundled, change(valid_set.features, [image.path for image in valid_set.images]))


def test_an_image_of_another_shape_is_reported(bundled: Any, photos: Path) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        pixels: Tensor = bundled[1](image)
        return pixels[:, :, 1:] if image.size == (9, 9) else pixels

    Image.new("RGB", (9, 9)).save(photos / "small.png")
    lines: list[str] = []
    support_set = support.retrieve(
        bundled[0], preprocess, bundled[2], prompts_of(["one"]), photos, per_class=60, report=lines.append
    )
    assert len(support_set.images) == 60
    assert lines == [f"skipped {photos / 'small.png'}: preprocessing gave (3,32,31) instead of (3,32,32)"]


def test_a_class_with_fewer_images_than_wanted_is_named(bundled: Any, photos: Path) -> None:
    with pytest.warns(UserWarning, match=r"^expected 61 images per class, got fewer of 'seven' \(60\), 'zero' \(60\)"):
        retrieve(bundled, photos, per_class=61)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_pipe_among_precomputed_files_is_refused_at_once(bundled: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    features = torch.eye(2, bundled[0].visual.output_dim)
    with pytest.raises(ValueError, match=r"expected a file, got .*pipe\.png, which is not a regular file"):
        retrieve(bundled, (features, [str(tmp_path / "pipe.png"), "other"]))


def test_a_manifest_that_links_to_itself_marks_no_support_set(bundled: Any, photos: Path) -> None:
    (photos / "0" / "manifest.json").symlink_to("manifest.json")
    assert retrieve(bundled, photos, per_class=60).counts.tolist() == [60, 60, 60]
