"""The verb embed: its sources, its models, its exit statuses, signals, and what it leaves for search."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels import freezing
from clipkernels.cli import embed as verb
from clipkernels.cli import main
from clipkernels.cli.parts import reporter
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.collection.engines import Progress
from clipkernels.images import Reader
from tests.cli.commands import run, succeed
from tests.collection.pictures import broken_files, draw_pictures, folder_bytes, read_rows
from tests.subprocesses import without_xdist

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
TOY = "note: without --model this is the bundled model for 32×32 images, a toy"
FAST = ("--workers", 0, "--devices", "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten pictures, with captions beside six of them."""
    return draw_pictures(tmp_path / "photos", 10)


def rows_of(folder: Path) -> np.ndarray:
    """The embeddings of a collection."""
    return np.float32([row["embedding"] for row in read_rows(folder)])


def embeddings_of(model: Any, preprocess: Any, files: list[Path]) -> np.ndarray:
    """The embeddings of files as one batch, of length one."""
    size = preprocess(Image.new("RGB", (40, 40))).shape
    images = [Reader().prepare(file, preprocess, tuple(size)) for file in files]
    with torch.inference_mode():
        embedding = ck.encode_image(model, torch.stack(images)).embedding
    return torch.nn.functional.normalize(embedding.float()).numpy()


def close_to(rows: np.ndarray, expected: np.ndarray) -> bool:
    """True if all cosines are one."""
    return rows.shape == expected.shape and bool(np.allclose((rows * expected).sum(1), 1, atol=1e-5))


def test_a_folder_is_embedded_and_searched(photos: Path, tmp_path: Path) -> None:
    result = succeed("embed", photos, "--out", tmp_path / "DIR", *FAST)
    toy, note, summary = result.stderr.splitlines()
    assert result.stdout == "" and toy == TOY and note == f"{photos}: skipped 6 .txt: not images"
    assert re.fullmatch(
        rf"10 images embedded in \d+ s, \d+\.\d images/s; 10 embeddings in {tmp_path}/DIR/embeddings", summary
    )
    model, preprocess, _ = ck.bundled()
    assert np.array_equal(rows_of(tmp_path / "DIR"), embeddings_of(model, preprocess, sorted(photos.glob("*.png"))))
    hits = json.loads(
        succeed("search", tmp_path / "DIR", "--image", photos / "07.png", "-k", 3, "--format", "json").stdout
    )["hits"]
    assert (hits[0]["id"], len(hits)) == ("07.png", 3) and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    hits = json.loads(succeed("search", tmp_path / "DIR", "a digit", "--format", "json").stdout)["hits"]
    assert sorted(hit["id"] for hit in hits) == [f"{n:02}.png" for n in range(10)]


def test_a_rerun_says_that_nothing_is_left_to_do(photos: Path, tmp_path: Path) -> None:
    succeed("embed", photos, "--out", tmp_path / "DIR", *FAST)
    before = folder_bytes(tmp_path / "DIR", times=True)
    result = succeed("embed", photos, "--out", tmp_path / "DIR", *FAST)
    assert result.stderr.splitlines()[-1].startswith("0 images embedded in ")
    assert "images/s" not in result.stderr and folder_bytes(tmp_path / "DIR", times=True) == before
    (photos / "03.png").unlink()
    assert (
        "1 row whose image is not there any more (--prune)"
        in succeed("embed", photos, "--out", tmp_path / "DIR").stderr
    )
    result = succeed("embed", photos, "--out", tmp_path / "DIR", "--prune", *FAST)
    assert result.stderr.splitlines()[-1].endswith(f"; 9 embeddings in {tmp_path}/DIR/embeddings; 1 row removed")


def test_a_source_that_is_not_there_is_forgotten(photos: Path, tmp_path: Path) -> None:
    other = photos.rename(tmp_path / "old")
    succeed("embed", other, "--out", tmp_path / "DIR", *FAST)
    other.rename(tmp_path / "new")
    options = (tmp_path / "new", "--out", tmp_path / "DIR", "--prune", *FAST)
    assert "forget those" in run("embed", *options).stderr.splitlines()[-1]
    result = succeed("embed", *options, "--forget", other)
    assert "0 images embedded" in result.stderr and "10 embeddings" in result.stderr
    assert "removed" not in result.stderr


def test_images_that_are_left_out_are_exit_one(photos: Path, tmp_path: Path) -> None:
    reasons = broken_files(photos)
    result = run("embed", photos, "--out", tmp_path / "DIR", *FAST)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.endswith(f"; {len(reasons)} images left out, see {tmp_path}/DIR/errors (--retry)")
    first = min(reasons)
    *_, named, more, _ = result.stderr.splitlines()
    assert f"skipped {first}: {reasons[first]}" in result.stderr and named.startswith("skipped ")
    assert more == f"skipped {len(reasons) - 3} more"
    result = run("embed", photos, "--out", tmp_path / "DIR", "--retry", *FAST)
    assert result.exit_code == 1 and result.stderr.endswith(f"{tmp_path}/DIR/errors\n")


def test_a_collection_without_a_readable_image_is_exit_two(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"nothing")
    result = run("embed", tmp_path / "photos", "--out", tmp_path / "DIR", *FAST)
    assert result.exit_code == 2 and "2 images left out, see" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere",), "'nowhere', which matches nothing"),
        (("EMPTY",), "expected images"),
        (("PHOTOS", "PHOTOS/00.png"), "'00.png'"),
        (("PHOTOS", "--method", "evit:7"), "evit:7"),
        (("PHOTOS", "--method", "patch-ranking"), "--predictor"),
        (("PHOTOS", "--devices", "tpu:9"), "tpu:9"),
        (("PHOTOS", "--text", "json"), "'json'"),
        (("PHOTOS", "--column", "width"), "expected columns of the sources ('txt'), got 'width'"),
        (("PHOTOS", "--id-column", "key"), "id_column='key'"),
        (("PHOTOS", "--model", "ViT-B-33"), "ViT-B-33"),
        (("PHOTOS", "--library", "timm"), "--model"),
        (("PHOTOS", "--library", "timm", "--model", "test_vit", "--text", "txt"), "timm has no text tower"),
        (("PHOTOS", "--precision", "int8"), "int8"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(
    arguments: tuple[str, ...], expected: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"PHOTOS": photos, "PHOTOS/00.png": photos / "00.png", "EMPTY": tmp_path / "empty"}
    result = run("embed", *(places.get(part, part) for part in arguments), "--out", tmp_path / "DIR")
    lines = [line for line in result.stderr.splitlines() if line != TOY]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]
    assert not (tmp_path / "DIR").exists()


def test_sources_are_found_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkernels.cli.embed.load", lambda *arguments: pytest.fail("a model is loaded"))
    assert "matches nothing" in run("embed", tmp_path / "nowhere", "--out", tmp_path / "DIR").stderr


def test_another_run_than_the_collections_is_refused(photos: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "DIR", *FAST)
    succeed("embed", photos, *out, "--method", "evit:0.7")
    before = folder_bytes(tmp_path / "DIR", times=True)
    for options, expected in (
        ((), "method: "),
        (("--method", "tome:4"), "method: "),
        (("--method", "evit:0.7", "--precision", "bf16"), "precision: "),
        (("--method", "evit:0.7", "--no-exif"), "reader: "),
        (("--method", "evit:0.7", "--raw"), "normalised: true became false"),
    ):
        result = run("embed", photos, *out, *options)
        assert result.exit_code == 2 and expected in result.stderr.splitlines()[-1]
        assert folder_bytes(tmp_path / "DIR", times=True) == before
    succeed("embed", photos, *out, "--method", "evit:0.7", "--batch-size", 3)


def test_a_reducing_method_asks_for_queries_encoded_alike(photos: Path, tmp_path: Path) -> None:
    result = succeed("embed", photos, "--out", tmp_path / "DIR", "--method", "tome:4", *FAST)
    assert "note: tome:4 changes embeddings, and so which images are nearest: " in result.stderr
    model, preprocess, _ = ck.bundled()
    ck.patch(model, ck.ToMe(4))
    files = sorted(photos.glob("*.png"))
    assert np.array_equal(rows_of(tmp_path / "DIR"), embeddings_of(model, preprocess, files))
    search = ("search", tmp_path / "DIR", "--image", files[3], "-k", 1, "--format", "json")
    [hit] = json.loads(succeed(*search).stdout)["hits"]
    assert hit["id"] == "03.png" and hit["score"] == pytest.approx(1, abs=1e-5)
    for method in ("dense", "none"):
        assert "note: " not in succeed(
            "embed", photos, "--out", tmp_path / method, "--method", method, *FAST
        ).stderr.replace(TOY, "")


def test_the_example_of_the_help_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in verb.EXAMPLE.splitlines() if line.strip().startswith("clipkernels ")]
    assert lines[0] == "clipkernels demo --quick --model none --save-images pictures" and len(lines) == 2
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path / "pictures")
    succeed(*shlex.split(lines[1])[1:])
    hits = succeed("search", "collection", "the handwritten digit seven", "-k", 5, "--format", "csv")
    assert len(hits.stdout.splitlines()) == 6


def test_captions_of_sidecars_are_found_by_text(photos: Path, tmp_path: Path) -> None:
    (photos / "02.txt").write_text("x" * 200)
    result = succeed("embed", photos, "--out", tmp_path / "DIR", "--text", "txt", "--column", "txt", *FAST)
    assert "the tokenizer cut 1 caption, too long for the text tower" in result.stderr
    rows = read_rows(tmp_path / "DIR")
    assert [row["text"] for row in rows[:2]] == ["picture 0", "picture 1"] == [row["txt"] for row in rows[:2]]
    assert rows[6]["text"] is None and not any(rows[6]["text_embedding"])


def containers(photos: Path, folder: Path) -> dict[str, Path]:
    """The pictures as Parquet of bytes, as WebDataset tar and as dataset on disk, with captions and labels."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    files = sorted(photos.glob("*.png"))
    contents, labels = [file.read_bytes() for file in files], list(range(len(files)))
    pa.parquet.write_table(pa.table({"image": contents, "caption": map(str, labels)}), folder / "p.parquet")
    with tarfile.open(folder / "t.tar", "w") as tar:
        for file, content in zip(files, contents, strict=True):
            for suffix, data in ((".png", content), (".caption", f"label {file.stem}".encode())):
                member = tarfile.TarInfo(file.stem + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    data = {"image": [{"bytes": content, "path": None} for content in contents], "caption": list(map(str, labels))}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(folder / "dataset")
    return {"parquet": folder / "p.parquet", "tar": folder / "t.tar", "datasets": folder / "dataset"}


def test_containers_hold_the_same_images_as_a_folder(photos: Path, tmp_path: Path) -> None:
    model, preprocess, _ = ck.bundled()
    expected = embeddings_of(model, preprocess, sorted(photos.glob("*.png")))
    for kind, source in containers(photos, tmp_path).items():
        options = ("--text", "caption", "--workers", 1 if kind == "datasets" else 0, "--devices", "cpu")
        succeed("embed", source, "--out", tmp_path / f"DIR {kind}", *options)
        rows = read_rows(tmp_path / f"DIR {kind}")
        assert np.array_equal(np.float32([row["embedding"] for row in rows]), expected), kind
        assert all(row["text_embedding"] for row in rows) and len({row["id"] for row in rows}) == 10
        assert "0 images embedded" in succeed("embed", source, "--out", tmp_path / f"DIR {kind}", *options).stderr


def test_the_layout_of_clip_retrieval_is_written_beside(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "DIR"
    options = ("--out", out, "--text", "txt", "--format", "clip-retrieval", *FAST)
    succeed("embed", photos, *options)
    assert np.array_equal(np.load(out / "img_emb" / "img_emb_0.npy"), rows_of(out))
    assert np.load(out / "text_emb" / "text_emb_0.npy").shape == (10, 128)
    table = pa.parquet.read_table(out / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["image_path"] == [f"{n:02}.png" for n in range(10)] and table["caption"][0] == "picture 0"
    Image.new("RGB", (9, 9)).save(photos / "new.png")
    succeed("embed", photos, *options)
    assert len(np.load(out / "img_emb" / "img_emb_0.npy")) == 11


def test_open_clip(registered: str, photos: Path, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms(registered)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = ("--model", registered, "--pretrained", tmp_path / "model.safetensors", *FAST)
    result = succeed("embed", photos, "--out", tmp_path / "DIR", *options)
    assert TOY not in result.stderr
    files = sorted(photos.glob("*.png"))
    assert close_to(rows_of(tmp_path / "DIR"), embeddings_of(model.eval(), preprocess, files))
    check_queries(tmp_path / "DIR", files)


def test_a_resnet_has_no_method(resnet: str, photos: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "DIR", "--model", resnet, *FAST)
    assert run("embed", photos, *options, "--method", "evit:0.7").exit_code == 2
    result = succeed("embed", photos, *options)
    assert f"warning: {resnet} has random weights without --pretrained" in result.stderr
    assert "0 images embedded" in succeed("embed", photos, *options).stderr


def check_queries(folder: Path, files: list[Path], text: bool = True) -> None:
    """Search with an image that is in a collection, and with a text; the model loads again by its names."""
    search = ("search", folder, "-k", 1, "--format", "json")
    [hit] = json.loads(succeed(*search, "--image", files[4]).stdout)["hits"]
    assert hit["id"] == "04.png" and hit["score"] == pytest.approx(1, abs=1e-4)
    if text:
        assert len(json.loads(succeed(*search, "a cat").stdout)["hits"]) == 1


def test_siglip_of_transformers(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.local_transformers import image_processor, save_siglip

    save_siglip(tmp_path / "siglip")
    monkeypatch.chdir(tmp_path)
    library = ("--library", "transformers", "--pretrained", "local")
    succeed("embed", photos, "--out", "DIR", *library, "--model", "siglip", "--text", "txt", *FAST)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "siglip", local_files_only=True).eval()
    processor, files = image_processor(), sorted(photos.glob("*.png"))
    expected = embeddings_of(
        model, lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0], files
    )
    assert close_to(rows_of(tmp_path / "DIR"), expected)
    monkeypatch.chdir(photos)  # the manifest names the model's folder so that any folder finds it
    check_queries(tmp_path / "DIR", files)
    again = succeed("embed", photos, "--out", "../DIR", *library, "--model", "../siglip", "--text", "txt", *FAST)
    assert "0 images embedded" in again.stderr


def test_timm(photos: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    options = ("--library", "timm", "--model", "test_vit", "--pretrained", tmp_path / "vit.safetensors")
    succeed("embed", photos, "--out", tmp_path / "DIR", *options, "--method", "evit:0.5", *FAST)
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ck.patch(model, ck.EViT(0.5))
    files = sorted(photos.glob("*.png"))
    assert close_to(rows_of(tmp_path / "DIR"), embeddings_of(model, preprocess, files))
    check_queries(tmp_path / "DIR", files, text=False)


def test_a_predictor_is_part_of_the_method(photos: Path, tmp_path: Path) -> None:
    ranks = ("--score", "feature", "--window", 8, "--stride", 8, "--step", 64, "--device", "cpu")
    succeed("rank", photos, "--output", tmp_path / "ranks", *ranks)
    for seed in (0, 1):
        options = ("--epochs", 1, "--seed", seed, "--device", "cpu", "--output", tmp_path / f"predictor{seed}")
        succeed("train-predictor", tmp_path / "ranks", *options)
    method = ("--method", "patch-ranking:0.5", *FAST, "--out", tmp_path / "DIR", "--predictor")
    result = succeed("embed", photos, *method, tmp_path / "predictor0")
    assert "note: patch-ranking:0.5 changes embeddings" in result.stderr
    assert "0 images embedded" in succeed("embed", photos, *method, tmp_path / "predictor0").stderr
    other = run("embed", photos, *method, tmp_path / "predictor1")
    assert other.exit_code == 2 and "method: " in other.stderr.splitlines()[-1]
    search = run("search", tmp_path / "DIR", "--image", photos / "00.png")
    assert search.exit_code == 0 and "cannot be applied" in search.stderr


@pytest.mark.slow
def test_a_compiled_tower_gives_the_same_neighbours(photos: Path, tmp_path: Path) -> None:
    succeed("embed", photos, "--out", tmp_path / "plain", "--batch-size", 4, *FAST)
    succeed("embed", photos, "--out", tmp_path / "DIR", "--batch-size", 4, "--compile", *FAST)
    assert close_to(rows_of(tmp_path / "DIR"), rows_of(tmp_path / "plain"))


def test_a_tower_that_cannot_be_compiled_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(freezing, "_compile_in_turn", refuse)
    result = run("embed", photos, "--out", tmp_path / "DIR", "--batch-size", 4, "--compile", *FAST)
    expected = "error: torch.compile cannot compile this tower, leave out compiled=True (--compile): "
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(expected)
    assert "no compiler anywhere" in result.stderr


@contextmanager
def slowly(pause: float, limit: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process of the command line that pauses between batches, in a session of its own."""
    command = [sys.executable, "-m", "tests.cli.embed_slowly", str(pause), str(limit), *map(str, arguments)]
    environment = {**without_xdist(os.environ), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def wait_for_units(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a process has finished units."""
    deadline = time.monotonic() + 120
    while not (folder / "units").is_dir() or len(list((folder / "units").glob("0*.parquet"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch(number: signal.Signals, status: int, photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "DIR", ("--batch-size", 1, "--unit-rows", 1, "--devices", "cpu")
    with slowly(0.4, 0, "embed", photos, "--out", out, *options, "--workers", 1) as process:
        wait_for_units(out, 2, process)
        other = error_of_lock(run("embed", photos, "--out", out, *options))
        assert f"process {process.pid} on " in other
        os.killpg(process.pid, number)  # the loaders get it too
        _, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if "skipped" not in line and line != TOY]
    assert process.returncode == status, stderr
    assert lines[0] == "stopping after this batch; a second signal stops at once" and len(lines) == 2, stderr
    done = int(re.match(r"stopped after (\d+) of 10 images; the same command goes on; ", lines[1])[1])
    assert 2 <= done < 10 and len(read_rows(out)) == done and not (out / ".lock").exists()
    result = succeed("embed", photos, "--out", out, *options, "--workers", 0)
    assert f"{10 - done} images embedded" in result.stderr
    succeed("embed", photos, "--out", tmp_path / "one", *options, "--workers", 0)
    for file in (tmp_path / "one" / "embeddings").iterdir():
        assert file.read_bytes() == (out / "embeddings" / file.name).read_bytes()


def error_of_lock(result: Any) -> str:
    """The last line of a run that is refused."""
    assert result.exit_code == 2
    line: str = result.stderr.splitlines()[-1]
    assert line.startswith("error: expected ") and "to have one writer" in line
    return line


def test_a_second_signal_stops_at_once(photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "DIR", ("--batch-size", 2, "--unit-rows", 2, "--devices", "cpu")
    with slowly(60, 0, "embed", photos, "--out", out, *options, "--workers", 0) as process:
        wait_for_units(out, 1, process)
        process.send_signal(signal.SIGTERM)
        assert "stopping after this batch" in next(line for line in process.stderr if "stopping" in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
    succeed("embed", photos, "--out", out, *options)
    assert [row["id"] for row in read_rows(out)] == [f"{n:02}.png" for n in range(10)]


def test_a_full_disk_is_one_line_and_the_rerun_goes_on(photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "DIR", ("--batch-size", 4, "--unit-rows", 4, "--devices", "cpu", "--workers", 0)
    with slowly(0, 9000, "embed", photos, "--out", out, *options) as process:
        _, stderr = process.communicate(timeout=120)
    line = stderr.splitlines()[-1]
    assert process.returncode == 2 and line.startswith("error: expected files that can be read and written, got "), (
        stderr
    )
    assert str(out) in line and "File too large" in line and "Traceback" not in stderr
    for kind in ("embeddings", "units"):
        for file in (out / kind).glob("0*"):
            pa.parquet.read_table(file)  # whole
    succeed("embed", photos, "--out", out, *options)
    succeed("embed", photos, "--out", tmp_path / "one", *options)
    assert (out / "embeddings" / "00000.parquet").read_bytes() == (
        tmp_path / "one" / "embeddings" / "00000.parquet"
    ).read_bytes()
    assert not [file for file in out.rglob(".*") if file.name != ".lock"]


def test_a_line_every_thirty_seconds_off_a_terminal(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "SECONDS_BETWEEN_LINES", 0)
    (photos / "bad.png").write_bytes(b"")
    result = run("embed", photos, "--out", tmp_path / "DIR", "--batch-size", 4, *FAST)
    lines = [line for line in result.stderr.splitlines() if " left" in line and " of 11 images, " in line]
    assert [int(line.split()[0]) for line in lines] == [4, 8, 11]
    assert re.fullmatch(r"11 of 11 images, \d+\.\d images/s, 1 error, 0 s left", lines[2])
    monkeypatch.setattr(reporter, "SECONDS_BETWEEN_LINES", 30)
    assert " of 11 images" not in run("embed", photos, "--out", tmp_path / "other", *FAST).stderr


def test_the_rate_is_that_of_the_batches_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: clock[0])
    counter = reporter.Reporter([], "embedding")
    rates = []
    for seconds, done in ((60, 32), (1, 64), (1, 128)):
        clock[0] += seconds
        rates.append(counter.rate(Progress(done, 1000, 0), clock[0]))
    assert rates == pytest.approx([32 / 60, 32, 48])


def test_the_rate_of_a_new_activity_counts_from_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: clock[0])
    with reporter.Reporter([], "embedding") as counter:
        clock[0] += 7
        counter(Progress(1000, 1000, 0))
        clock[0] += 4
        counter.begin("training")
        assert counter.rate(Progress(2, 10, 0), clock[0]) == pytest.approx(2 / 4)


def test_a_terminal_has_a_bar(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    leader, follower = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(leader, 4096):
                shown.append(part)

    reader = Thread(target=read)
    reader.start()
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with pytest.raises(SystemExit) as status:
            main([str(part) for part in ("embed", photos, "--out", tmp_path / "DIR", "--batch-size", 1, *FAST)])
        monkeypatch.undo()
    reader.join()
    os.close(leader)
    text = click.unstyle(b"".join(shown).decode())
    assert not status.value.code and "10/10" in text and "10 images embedded in" in text
    rates = [float(rate) for rate in re.findall(r"embedding, (\d+\.\d) images/s", text)]
    assert rates and max(rates) < 1e5 and " left\r\n" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert reporter.duration(seconds) == text
