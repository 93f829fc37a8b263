"""`clipkernels search` and `dedup`: the library's own answers, pictures of hits, and refusals."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("faiss", reason="faiss-cpu is not installed")

import pyarrow.parquet as pq

from clipkernels.collection import contact_sheet
from clipkernels.collection.contact_sheet import CAPTION, MARGIN, THUMBNAIL, draw_hits, image_reader
from clipkernels.collection.search import Hit, search
from tests.cli.commands import error, error_after_warnings, run, succeed
from tests.collection.finished import manifest_for, unit_vectors, write_collection

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 7
HERE = ("--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of one colour each, with noise; the last is a copy of the third."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(COUNT - 1):
        pixels = draw.integers(0, 60, (40, 30 + 10 * number, 3)) + draw.integers(0, 196, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    (folder / f"{COUNT - 1}.png").write_bytes((folder / "2.png").read_bytes())
    return folder


def embeddings(photos: Path, method: ck.Method | None = None, precision: torch.dtype = torch.float32) -> np.ndarray:
    model, preprocess, _ = ck.bundled()
    model = model.to(precision)
    if method is not None:
        ck.patch(model, method)
    images = [preprocess(Image.open(photos / f"{number}.png").convert("RGB")) for number in range(COUNT)]
    with torch.no_grad():
        features = ck.encode_image(model, torch.stack(images).to(precision)).embedding
    return torch.nn.functional.normalize(features.float()).numpy()


@pytest.fixture
def collection(tmp_path: Path, photos: Path) -> Path:
    contents = [(photos / f"{number}.png").read_bytes() for number in range(COUNT)]
    manifest = manifest_for(128, sources=[str(photos)])
    return write_collection(tmp_path / "collection", [embeddings(photos)], manifest, contents=contents)


def test_a_text_gives_the_hits_of_the_library_in_every_format(collection: Path) -> None:
    hits = search(collection, "a red square", k=3)
    result = succeed("search", collection, "a red square", "-k", 3, "--format", "json", *HERE)
    document = json.loads(result.stdout)
    assert result.stderr == f"3 hits in {collection}\n"
    assert (document["folder"], document["text"], document["image"]) == (str(collection), "a red square", None)
    assert document["hits"] == [
        {"rank": hit.rank, "id": hit.id, "score": round(hit.score, 6), **hit.values} for hit in hits
    ]
    rows = list(csv.DictReader(io.StringIO(succeed("search", collection, "a red square", "--format", "csv").stdout)))
    assert len(rows) == COUNT and [row["id"] for row in rows[:3]] == [hit.id for hit in hits]
    assert list(rows[0]) == ["rank", "id", "score", "sha256", "width", "height"]
    table = succeed("search", collection, "a red square", "-k", 3).stdout
    assert all(f"{hit.score:.4f}" in table and hit.id in table for hit in hits)


def test_an_image_finds_itself_and_its_copy(collection: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "hits.json"
    arguments = ("--image", photos / "2.png", "-k", 2, "--format", "json", "--output", output)
    assert succeed("search", collection, *arguments).stdout == ""
    hits = json.loads(output.read_text())["hits"]
    assert [(hit["id"], hit["score"]) for hit in hits] == [(f"{n}.png", pytest.approx(1, abs=1e-5)) for n in (2, 6)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_query_has_the_method_and_the_precision_of_the_collection(
    tmp_path: Path, photos: Path, precision: str
) -> None:
    vectors = embeddings(photos, ck.ToMe(8), getattr(torch, precision))
    model = ck.bundled()[0].to(getattr(torch, precision))
    manifest = manifest_for(128, model, [str(photos)], "tome:8", method=repr(ck.ToMe(8)), precision=precision)
    folder = write_collection(tmp_path / "collection", [vectors], manifest)
    result = succeed("search", folder, "--image", photos / "3.png", "-k", 1, "--format", "json", *HERE)
    [hit] = json.loads(result.stdout)["hits"]
    assert (hit["id"], hit["score"]) == ("3.png", pytest.approx(1, abs=1e-3))
    assert result.stderr == f"1 hit in {folder}\n"


@pytest.mark.parametrize("spec", [None, "patch-ranking:0.6"])
def test_a_method_that_cannot_be_applied_is_a_warning(tmp_path: Path, photos: Path, spec: str | None) -> None:
    manifest = manifest_for(128, sources=[str(photos)], spec=spec, method="Mine(2)")
    folder = write_collection(tmp_path / "collection", [embeddings(photos)], manifest)
    lines = succeed("search", folder, "--image", photos / "3.png", *HERE).stderr.splitlines()
    assert lines[-2].startswith(f"warning: the query is encoded with host, the images of {folder} with Mine(2): ")
    reasons = [line for line in lines[:-2] if line.startswith(f"warning: the method of {folder}, Mine(2), cannot be")]
    assert len(reasons) == (spec is not None) and len(lines) == 2 + len(reasons)
    assert succeed("search", folder, "a text", *HERE).stderr == f"{COUNT} hits in {folder}\n"


def test_an_open_clip_model_is_loaded_by_its_name(tmp_path: Path, photos: Path, registered: str) -> None:
    import open_clip

    torch.manual_seed(0)  # as the command line does without weights
    model, _, preprocess = open_clip.create_model_and_transforms(registered)
    images = torch.stack([preprocess(Image.open(photos / f"{number}.png")) for number in range(COUNT)])
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.eval().encode_image(images)).numpy()
    manifest = manifest_for(16, model, [str(photos)], library="open_clip", model=registered)
    folder = write_collection(tmp_path / "collection", [vectors], manifest)
    for query in (["--image", photos / "4.png"], ["a text"]):
        result = succeed("search", folder, *query, "-k", 1, "--format", "json", *HERE)
        [hit] = json.loads(result.stdout)["hits"]
        assert "has random weights without --pretrained" in result.stderr.splitlines()[0]
        if "a text" not in query:
            assert (hit["id"], hit["score"]) == ("4.png", pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize(
    ("settings", "query", "message"),
    [
        ({"library": None, "model": None}, "a", "made from Python: search with clipkernels.search"),
        (
            {"library": "timm", "model": "vit"},
            "a",
            "expected --image for a collection of timm's vit, which has no text",
        ),
        ({"library": "timm", "model": "vit"}, None, "expected one of timm's models"),
        ({"library": "open_clip", "model": "RN50-none"}, "a", "expected one of open_clip's models (RN50"),
        ({"library": "open_clip", "model": "RN50"}, "a", "got another tower"),
    ],
)
def test_models_that_do_not_fit_are_one_line(
    tmp_path: Path, photos: Path, settings: dict[str, Any], query: str | None, message: str
) -> None:
    folder = write_collection(tmp_path / "collection", [unit_vectors(2, 128)], manifest_for(128, **settings))
    arguments = ["--image", photos / "1.png"] if query is None else [query]
    assert message in error_after_warnings(run("search", folder, *arguments, *HERE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a text or --image, got neither"),
        (("a", "--image", "PHOTO"), "expected a text or --image, got both"),
        ((" ",), "expected a text that is not empty, got ' '"),
        (("--image", "TEXT"), "expected an image that can be read, got "),
        (("a", "-k", "0"), "Invalid value for '-k'"),
        (("a", "--picture", "hits.txt"), "expected a picture that ends in .png, .jpg, .jpeg, .webp, got hits.txt"),
        (("a", "--picture", "missing/hits.png"), "expected a file that can be written for --picture"),
        (("a", "--picture", "same.png", "--output", "same.png"), "expected --output and --picture to differ"),
    ],
)
def test_refusals(
    collection: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(collection.parent)
    Path("text.txt").write_text("text")
    names = {"PHOTO": str(photos / "1.png"), "TEXT": "text.txt"}
    assert message in error(run("search", collection, *[names.get(argument, argument) for argument in arguments]))
    assert not Path("hits.png").exists()


@pytest.mark.parametrize("verb", [("search", "a"), ("dedup",)])
def test_a_folder_that_is_no_collection_is_one_line(tmp_path: Path, verb: tuple[str, ...]) -> None:
    name, *arguments = verb
    line = error(run(name, tmp_path, *arguments))
    assert line == f"error: expected a collection that clipkernels embed made, got {tmp_path} without manifest.json"


def test_an_empty_collection_has_no_hits(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "none", [], manifest_for(128))
    assert succeed("search", folder, "a", "--format", "csv").stdout == "rank,id,score\n"
    assert json.loads(succeed("search", folder, "a", "--format", "json").stdout)["hits"] == []
    result = succeed("search", folder, "a", "--picture", tmp_path / "hits.png")
    assert result.stderr == f"0 hits in {folder}\n" and (tmp_path / "hits.png").is_file()


# The picture.


def hits_for(*names: str) -> list[Hit]:
    return [Hit(rank, name, 0.5, {}) for rank, name in enumerate(names, 1)]


def test_the_picture_shows_the_hits_in_their_order(collection: Path, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "hits.png"
    result = succeed(
        "search", collection, "--image", photos / "5.png", "-k", 5, "--picture", picture, "--format", "json"
    )
    hits = json.loads(result.stdout)["hits"]
    sheet = Image.open(picture)
    assert sheet.size == (3 * (THUMBNAIL + MARGIN) + MARGIN, 2 * (THUMBNAIL + CAPTION + MARGIN) + MARGIN)
    for place, hit in enumerate(hits):
        centre = (MARGIN + place % 3 * (THUMBNAIL + MARGIN), MARGIN + place // 3 * (THUMBNAIL + CAPTION + MARGIN))
        box = (centre[0] + 70, centre[1] + 70, centre[0] + 130, centre[1] + 130)
        expected = np.asarray(Image.open(photos / hit["id"])).reshape(-1, 3).mean(0)
        assert np.abs(np.asarray(sheet.crop(box)).reshape(-1, 3).mean(0) - expected).max() < 12
        caption = sheet.crop((centre[0], centre[1] + THUMBNAIL, centre[0] + THUMBNAIL, centre[1] + THUMBNAIL + CAPTION))
        assert np.asarray(caption).min() < 100  # rank, score and id are written


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".PNG"])
def test_the_picture_has_the_format_of_its_name(collection: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"hits{suffix}"
    succeed("search", collection, "a", "-k", 2, "--picture", picture)
    assert Image.open(picture).format == {".jpg": "JPEG", ".webp": "WEBP", ".PNG": "PNG"}[suffix]
    assert sorted(os.listdir(tmp_path)) == ["collection", picture.name]


def test_an_image_that_is_not_there_has_its_reason_in_its_place(collection: Path, photos: Path, tmp_path: Path) -> None:
    contents = {"a": (photos / "0.png").read_bytes(), "b": "no such file", "c": b"no image", "d\n\u2603": "x" * 500}
    sheet = draw_hits(hits_for(*contents), contents.__getitem__, "1")
    grey = [
        sheet.getpixel(
            (MARGIN + place % 2 * (THUMBNAIL + MARGIN), MARGIN + place // 2 * (THUMBNAIL + CAPTION + MARGIN))
        )
        == contact_sheet.GREY
        for place in range(4)
    ]
    assert grey == [False, True, True, True]
    (photos / "not.png").write_bytes(b"no image")
    manifest = manifest_for(8, sources=["/nowhere", str(photos)])
    read = image_reader(manifest, ["0.png", "9.png"])
    assert read("0.png") == contents["a"]
    assert read("9.png") == f"not in '/nowhere', {str(photos)!r}"
    (photos / "not.png").unlink()


def test_extreme_shapes_and_many_hits_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {}
    for size in ((1, 1), (190, 1), (1, 190), (2000, 3000)):
        with io.BytesIO() as file:
            Image.new("RGB", size, (200, 0, 0)).save(file, "PNG")
            contents[str(size)] = file.getvalue()
    sheet = draw_hits(hits_for(*contents), contents.__getitem__, "1")
    assert sheet.getpixel((MARGIN + THUMBNAIL // 2, MARGIN + THUMBNAIL // 2)) == (200, 0, 0)
    monkeypatch.setattr(contact_sheet, "MAX_HITS", 7)
    sheet = draw_hits(hits_for(*["(1, 1)"] * 30), contents.__getitem__, "1")
    assert sheet.width == 3 * (THUMBNAIL + MARGIN) + MARGIN
    assert draw_hits([], contents.__getitem__, "1").mode == "RGB"


# dedup.


def test_dedup_counts_groups_and_writes_them(collection: Path) -> None:
    result = succeed("dedup", collection, "--threshold", "0.99999", "--format", "json", *HERE)
    document = json.loads(result.stdout)
    assert document == {
        **{"folder": str(collection), "images": COUNT, "groups": 1, "duplicates": 1, "equal content": 1},
        **{"largest group": 2, "threshold": 0.99999},
    }
    assert result.stderr == f"1 duplicate in 1 group: {collection}/duplicates.parquet\n"
    table = pq.read_table(collection / "duplicates.parquet").to_pydict()
    assert (table["group"], table["id"], table["similarity"]) == ([0, 0], ["2.png", "6.png"], [1.0, 1.0])
    [row] = csv.DictReader(io.StringIO(succeed("dedup", collection, "--threshold", "1", "--format", "csv").stdout))
    assert (row["images"], row["groups"]) == (str(COUNT), "1")
    assert "largest group" in succeed("dedup", collection).stdout


def test_dedup_of_an_empty_collection_finds_nothing(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "none", [], manifest_for(128))
    assert json.loads(succeed("dedup", folder, "--format", "json").stdout)["groups"] == 0


@pytest.mark.parametrize("threshold", ["1.5", "-2", "x", "nan"])
def test_dedup_refuses_thresholds_that_no_cosine_has(collection: Path, threshold: str) -> None:
    assert "threshold" in error(run("dedup", collection, "--threshold", threshold))


def test_dedup_says_which_file_cannot_be_written(collection: Path) -> None:
    (collection / "duplicates.parquet").mkdir()
    (collection / "duplicates.parquet" / "more").touch()
    assert "duplicates.parquet" in error(run("dedup", collection))
