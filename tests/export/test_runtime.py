"""Exported folders without torch: the runtime as a package, as a copy and on the command line."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clipkernels as ck
from clipkernels.runtime import Runtime
from clipkernels.runtime.command import main
from clipkernels.runtime.copying import SHARED, copy_into
from clipkernels.runtime.engines import load_engine
from tests.export.hand_export import pictures, sign

ALLOWED = {"numpy", "PIL", "tokenizers", "ftfy", "pillow_heif", "onnxruntime", "openvino", "torch"}
"""Packages that a runtime may import; torch for the types of the reader and for pt2."""


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be changed."""
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def runtime(written: Path) -> Runtime:
    return Runtime(written, threads=1)


@pytest.fixture(scope="module")
def host() -> tuple[nn.Module, Any, Any]:
    """The model, the preprocessing and the tokenizer that were exported."""
    model, preprocess, tokenizer = ck.bundled()
    return ck.patch(model, ck.EViT(keep=0.7)), preprocess, tokenizer


def close(actual: Any, expected: torch.Tensor) -> bool:
    """Return true if embeddings are those of PyTorch, to 1e-5 of the largest."""
    return bool(np.abs(actual - expected.numpy()).max() <= 1e-5 * expected.abs().max())


@torch.no_grad()
def test_embeddings_are_those_of_pytorch(runtime: Runtime, written: Path, host: Any) -> None:
    model, preprocess, tokenizer = host
    paths = [written.parent / f"{index}.png" for index in range(3)]
    pixels = torch.stack([preprocess(picture) for picture in pictures()])
    assert all(np.array_equal(runtime.preprocess(path), x.numpy()) for path, x in zip(paths, pixels, strict=True))
    expected = model.encode_image(pixels)
    actual = runtime.encode_image(paths, batch_size=2)
    assert close(actual, expected) and actual.dtype == np.float32
    texts = ["a red star", "", "Ärger & 日本 🐶"] * 3
    assert np.array_equal(runtime.tokenize(texts), tokenizer(texts).numpy())
    assert close(runtime.encode_text(texts, batch_size=4), model.encode_text(tokenizer(texts)))
    unit = runtime.encode_image(paths, normalize=True)
    assert np.allclose(unit, actual / np.linalg.norm(actual, axis=1, keepdims=True), atol=1e-6)
    assert np.allclose(np.linalg.norm(runtime.encode_text("a cat", normalize=True), axis=1), 1)


def test_every_kind_of_image_gives_the_same(runtime: Runtime, written: Path) -> None:
    path, picture = written.parent / "1.png", pictures()[1]
    kinds = [path, str(path), path.read_bytes(), picture, np.asarray(picture), runtime.preprocess(path)]
    embeddings = runtime.encode_image(kinds)
    assert np.allclose(embeddings, embeddings[:1], atol=1e-5)
    for single in kinds:
        assert np.allclose(runtime.encode_image(single), embeddings[:1], atol=1e-5)
    assert np.allclose(runtime.encode_image(np.stack([runtime.preprocess(path)] * 2)), embeddings[:2], atol=1e-5)
    assert runtime.encode_image([]).shape == (0, 128) and runtime.encode_text([]).shape == (0, 128)
    picture.transpose(Image.Transpose.ROTATE_90).save(written.parent / "turned.jpg", exif=turned_left())
    assert runtime.preprocess(written.parent / "turned.jpg").shape == (3, 32, 32)


def turned_left() -> Any:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_an_image_that_cannot_be_read_is_named(runtime: Runtime, written: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((written.parent / "0.png").read_bytes()[:60])
    images: list[Any] = [written.parent / "0.png", broken, tmp_path / "none.png", b"text", np.zeros((4, 4))]
    with pytest.raises(ValueError, match=r"expected an image that can be read, got .*broken\.png: ") as error:
        runtime.encode_image(images)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning) as warned:
        embeddings = runtime.encode_image(images, batch_size=2, errors="skip")
    lines = [str(warning.message) for warning in warned]
    assert lines[0].startswith(f"skipped {broken}: ") and lines[1].endswith("none.png: No such file or directory")
    assert lines[2] == "skipped image 3: not an image (no format that is read)"
    assert lines[3].startswith("skipped image 4: expected an array (H,W,3) uint8 or (3,32,32) float32, got (4, 4)")
    assert np.isnan(embeddings[1:]).all() and np.allclose(embeddings[0], runtime.encode_image(images[0]), atol=1e-5)


def test_arguments_are_checked(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match='errors must be "raise" or "skip", got'):
        runtime.encode_image([], errors="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        runtime.encode_image([], batch_size=0)
    for texts in ([1], None, 5, b"a"):
        with pytest.raises(TypeError, match="texts must be a list of texts"):
            runtime.encode_text(texts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"texts must be Unicode without lone surrogates, got \['a\\ud800'\]"):
        runtime.encode_text(["a\ud800"])
    with pytest.raises(TypeError, match="images must be an image or a list of images, got 5"):
        runtime.encode_image(5)
    for number in (0, None, [1]):  # 0 is the number of an open file
        with pytest.raises(ValueError, match="got image 0: expected a path, bytes, a PIL image or an array, got "):
            runtime.encode_image([number])
    length = runtime.info["text"]["context_length"]
    for ids, actual in (
        ([1, 2], "(2) int64"),
        (np.ones((1, 3), int), "(1,3) int64"),
        (np.ones((1, length)), "float64"),
    ):
        with pytest.raises(ValueError, match=rf"ids must be \(n,{length}\) of integers, got .*{re.escape(actual)}"):
            runtime.encode_ids(ids)
    assert runtime.encode_ids([[1] * length]).shape == (1, 128)
    images = runtime.encode_image(pictures())
    for texts in (images[:0], images[0], images[:, :3]):
        with pytest.raises(ValueError, match=r"expected embeddings \(n,E\) of images and \(K,E\) of texts"):
            runtime.probabilities(images, texts)
    assert runtime.encode_text(iter(["a", "b"])).shape == (2, 128)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_are_a_positive_number(threads: Any, written: Path) -> None:
    with pytest.raises(ValueError, match=r"threads must be at least 1, or None, got "):
        Runtime(written, threads=threads)


def test_a_folder_may_be_named_from_where_the_process_was(
    written: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written.parent)
    relative = Runtime(written.name)
    monkeypatch.chdir(tmp_path)
    for one in (relative, pickle.loads(pickle.dumps(relative))):
        assert np.array_equal(one.encode_text("a cat"), runtime.encode_text("a cat"))


@torch.no_grad()
def test_probabilities_are_those_of_the_classifier(runtime: Runtime, host: Any) -> None:
    model, preprocess, tokenizer = host
    classifier = ck.Classifier(model, tokenizer, ["cat", "dog", "star"])
    expected = classifier.probabilities(classifier(torch.stack([preprocess(picture) for picture in pictures()])))
    texts = [f"a photo of a {name}." for name in classifier.classes]
    images = runtime.encode_image(pictures())
    assert np.allclose(runtime.probabilities(images, runtime.encode_text(texts)), expected, atol=1e-5)
    assert runtime.logit_scale == pytest.approx(float(model.logit_scale.exp())) and runtime.logit_bias is None
    sigmoid = Runtime(runtime.folder)
    sigmoid.logit_scale, sigmoid.logit_bias = 10.0, -5.0
    a, b = np.array([[3.0, 4.0]], np.float32), np.array([[0.0, 2.0], [1.0, 0.0]], np.float32)
    assert np.allclose(sigmoid.probabilities(a, b), 1 / (1 + np.exp([[-3.0, -1.0]])))


def test_threads_share_a_runtime(runtime: Runtime) -> None:
    images = pictures()
    expected = runtime.encode_image(images)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda index: runtime.encode_image(images[index % 3]), range(12)))
    assert all(np.allclose(row, expected[index % 3], atol=1e-5) for index, row in enumerate(results))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the content of a folder's export.json and sign it again."""
    content = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    del content["sha256"]
    sign(folder, {**content, **changes})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("image.onnx", r"got another image\.onnx \(its SHA-256 differs\): export the model again"),
        ("tokenizer.json", r"got another tokenizer\.json"),
        ("runtime/encoders.py", r"got another runtime/encoders\.py"),
        ("export.json", r"as it was written, got another one \(its SHA-256 differs\)"),
    ],
)
def test_a_changed_file_is_refused(file: str, message: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    if file == "export.json":
        (folder / file).write_bytes(content.replace(b'"fp32"', b'"bf16"'))
    else:
        (folder / file).write_bytes(content + b" ")
    with pytest.raises(ValueError, match=message):
        Runtime(folder)


def test_other_folders_and_formats_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a folder that clipkernels export wrote, got .* without export\.json"
    ):
        Runtime(tmp_path)
    rewrite(folder, format="clipkernels.export.2")
    with pytest.raises(ValueError, match=r"got 'clipkernels\.export\.2', which another clipkernels wrote: update this"):
        Runtime(folder)
    rewrite(folder, format="onnx")
    with pytest.raises(ValueError, match="got 'onnx', export the model again"):
        Runtime(folder)
    for text in ("", "[]", "{}", "[" * 10**5):
        (folder / "export.json").write_text(text)
        with pytest.raises(ValueError, match=r"got .*export\.json without a format"):
            Runtime(folder)


def test_a_graph_that_does_not_load_is_one_line(folder: Path) -> None:
    (folder / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"expected a graph that onnx loads, got .*image\.onnx: ") as error:
        Runtime(folder, verify=False)
    assert "\n" not in str(error.value)
    rewrite(folder, files={"../image.onnx": "0" * 64})
    with pytest.raises(ValueError, match=r"expected names of files in .*, got '\.\./image\.onnx'"):
        Runtime(folder)
    rewrite(folder, runtime="tensorrt", files={})
    with pytest.raises(ValueError, match="expected one of the runtimes onnx, openvino, pt2, got 'tensorrt'"):
        Runtime(folder)


@pytest.mark.parametrize(
    ("part", "message"), [("text", "a text tower for texts"), ("tokenizer", "a tokenizer for texts")]
)
def test_a_folder_without_text_says_so(part: str, message: str, folder: Path) -> None:
    rewrite(folder, **{part: None})
    runtime = Runtime(folder)
    assert runtime.encode_image(pictures()).shape == (3, 128)
    with pytest.raises(ValueError, match=f"expected a folder with {message}, got .*out without: export"):
        runtime.encode_text(["a cat"])


class Linear(nn.Module):
    """A module whose output is known."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean((2, 3)) * 2


@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_every_runtime_gives_the_embeddings_of_its_graph(name: str, tmp_path: Path) -> None:
    images, shapes = torch.rand(2, 3, 4, 4), ({0: torch.export.Dim("batch", min=1, max=64)},)
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["image_embeds"]}
    file = tmp_path / f"graph.{'xml' if name == 'openvino' else name}"
    if name == "pt2":
        torch.export.save(torch.export.export(Linear().eval(), (images,), dynamic_shapes=shapes), file)
    else:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        program = torch.onnx.export(
            Linear().eval(), (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
        )
        assert program is not None
        program.save(str(tmp_path / "graph.onnx"))
        if name == "openvino":
            openvino = pytest.importorskip("openvino", reason="openvino is not installed")
            openvino.save_model(openvino.convert_model(tmp_path / "graph.onnx"), file, compress_to_fp16=False)
    threads = torch.get_num_threads()
    engine = load_engine(name, "fp32", file, {"input": "pixel_values", "output": "image_embeds"}, threads)
    for count in (1, 3):
        batch = np.random.default_rng(count).random((count, 3, 4, 4), np.float32)
        actual = engine(batch)
        assert np.allclose(actual, 2 * batch.mean((2, 3)), atol=1e-6) and actual.dtype == np.float32


SIGNALS = """
import gc, os, signal, sys
from pathlib import Path
import numpy, openvino
from openvino import opset13
from clipkernels.exporting.openvino import compiled, operators
from clipkernels.runtime.engines import load_engine
import torch

received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
entry = opset13.parameter([1, 4], numpy.float32)
entry.output(0).set_names({"images"})
result = opset13.relu(entry)
result.output(0).set_names({"embeddings"})
model, file = openvino.Model([result], [entry], "model"), Path(sys.argv[1])
openvino.save_model(model, str(file))


def load():
    return load_engine("openvino", "fp32", file, {"input": "images", "output": "embeddings"}, None)


makers = (load, lambda: compiled(model, "fp32"), lambda: operators(file), load, lambda: openvino.compile_model(model))
alive = []
for make in makers * 2:
    alive.append(make())
    if len(alive) > 2:
        alive.pop(0)
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
alive.clear()
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
print(len(received))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_a_signal_after_several_openvino_models_is_handled(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    command = [sys.executable, "-c", SIGNALS, str(tmp_path / "graph.xml")]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(ck.__file__).parents[1])}
    )
    assert (result.returncode, result.stdout) == (0, "11\n"), result.stderr


def run(arguments: Sequence[str], path: Path | None, blocked: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process where torch and msgspec cannot be imported, nor clipkernels without a path to it."""
    modules = ("torch", "msgspec", "open_clip", *(() if path else ("clipkernels",)))
    blocked.mkdir(exist_ok=True)
    blocks = "".join(f"sys.modules[{module!r}] = None\n" for module in modules)
    (blocked / "sitecustomize.py").write_text(f"import sys\n{blocks}")
    paths = os.pathsep.join(map(str, [blocked, *([path] if path else [])]))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=blocked)


def test_the_package_runs_without_torch(written: Path, runtime: Runtime, tmp_path: Path) -> None:
    code = (
        "import sys; from clipkernels.runtime import Runtime; runtime = Runtime(sys.argv[1]); import numpy;"
        "numpy.save('out.npy', runtime.encode_image([sys.argv[2]])); numpy.save('text.npy', runtime.encode_text('x'))"
    )
    photo = written.parent / "0.png"
    result = run(["-c", code, str(written), str(photo)], Path(ck.__file__).parents[1], tmp_path / "process")
    assert result.returncode == 0, result.stderr
    assert np.allclose(np.load(tmp_path / "process" / "out.npy"), runtime.encode_image(photo), atol=1e-5)
    assert np.allclose(np.load(tmp_path / "process" / "text.npy"), runtime.encode_text("x"), atol=1e-5)


def test_the_folder_runs_without_clipkernels(written: Path, runtime: Runtime, tmp_path: Path) -> None:
    photo = str(written.parent / "0.png")
    result = run([str(written / "runtime"), photo], None, tmp_path / "process")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["path"] == photo and np.allclose(record["embedding"], runtime.encode_image(photo)[0], atol=1e-5)
    texts = ["--texts", "a star", "a cat", "--json"]
    result = run([str(written / "runtime"), photo, *texts], None, tmp_path / "process")
    expected = runtime.probabilities(runtime.encode_image(photo), runtime.encode_text(["a star", "a cat"]))[0]
    probabilities = json.loads(result.stdout)["probabilities"]
    assert np.allclose([probabilities["a star"], probabilities["a cat"]], expected, atol=1e-5)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from runtime import Runtime; print(Runtime(sys.argv[1]))"
    result = run(["-c", code, str(written)], None, tmp_path / "process")
    assert "EViT(keep=0.7" in result.stdout, result.stderr


def test_copies_import_nothing_else(tmp_path: Path) -> None:
    names = copy_into(tmp_path)
    assert set(names) >= {f"runtime/{name}" for name in SHARED} and "runtime/copying.py" not in names
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")) == names
    for name in names:
        for node in ast.walk(ast.parse((tmp_path / name).read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                root = module.partition(".")[0]
                assert root in ALLOWED | {"runtime"} | sys.stdlib_module_names, f"{name} imports {module}"
                if root == "runtime":
                    path = tmp_path.joinpath(*module.split("."))
                    assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The status, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as exit:
        main(None, arguments)
    output = capsys.readouterr()
    return int(exit.value.code or 0), output.out, output.err


def test_the_command_line_prints_and_writes(
    written: Path, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [str(written.parent / f"{index}.png") for index in range(2)]
    status, out, err = command(capsys, str(written), *photos, "--out", str(tmp_path / "x.npy"), "--normalize")
    assert (status, out, err) == (0, "", "")
    assert np.allclose(np.load(tmp_path / "x.npy"), runtime.encode_image(photos, normalize=True), atol=1e-6)
    status, out, _ = command(capsys, str(written), photos[0], "--texts", "a star", "a cat")
    rows = out.splitlines()
    values = [float(row.split()[0]) for row in rows[1:]]
    assert status == 0 and rows[0] == photos[0] and values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=2e-4) and {row.split("  ")[2] for row in rows[1:]} == {"a star", "a cat"}
    (tmp_path / "broken.png").write_bytes(b"")
    status, out, err = command(capsys, str(written), photos[0], str(tmp_path / "broken.png"))
    assert status == 1 and err.startswith(f"skipped {tmp_path / 'broken.png'}: ") and err.count("\n") == 1
    assert [json.loads(line)["embedding"] is None for line in out.splitlines()] == [False, True]
    for wrong in ((str(tmp_path), photos[0]), (str(written), "none.png")):
        status, out, err = command(capsys, *wrong)
        assert status == 2 and not out and err.startswith("error: expected ") and err.count("\n") == 1
    status, _, err = command(capsys, str(written), photos[0], "--texts", "a", "--out", "x.npy")
    assert status == 2 and "expected --out or --texts, got both" in err


def test_out_is_the_file_that_is_named_or_one_line(
    written: Path, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [str(written.parent / f"{index % 3}.png") for index in range(70)]
    expected = runtime.encode_image(photos)
    assert command(capsys, str(written), *photos, "--out", str(tmp_path / "x.bin")) == (0, "", "")
    assert np.allclose(np.load(tmp_path / "x.bin"), expected, atol=1e-6) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(Runtime, "encode_image", None)  # a file that cannot be written costs no images
    for wrong, message in (
        (tmp_path / "none" / "x.npy", "file that can be written for --out, got {}: No such file or directory"),
        (tmp_path, "file for --out, got {}"),
        (os.devnull, "file for --out, got {}"),
    ):
        status, out, err = command(capsys, str(written), photos[0], "--out", str(wrong))
        assert (status, out, err) == (2, "", f"error: expected a {message.format(wrong)}\n")


def test_results_are_printed_as_they_come(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, lines = [str(written.parent / f"{index % 3}.png") for index in range(70)], []
    encode = Runtime.encode_image

    def watched(self: Runtime, *arguments: Any, **options: Any) -> Any:
        lines.append(capsys.readouterr().out.count("\n"))
        return encode(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "encode_image", watched)
    status, out, _ = command(capsys, str(written), *photos)
    assert (status, lines, out.count("\n")) == (0, [0, 32, 32], 6)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_a_reader_that_stops_ends_the_command_line_quietly(written: Path, tmp_path: Path) -> None:
    photos = [str(written.parent / f"{index % 3}.png") for index in range(200)]
    program = [sys.executable, str(written / "runtime"), *photos]
    result = subprocess.run(
        f"{shlex.join(program)} | head -n 1", shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stderr == "" and json.loads(result.stdout)["path"] == photos[0]


def test_a_package_that_is_missing_is_one_line(written: Path, tmp_path: Path) -> None:
    for module in ("numpy", "onnxruntime"):
        code = (
            "import runpy, sys; sys.modules[sys.argv[1]] = None; folder = sys.argv[2]; sys.argv[1:] = ['photo.jpg']\n"
            "sys.path.insert(0, ''); runpy.run_path(folder, run_name='__main__')"
        )
        result = run(["-c", code, module, str(written / "runtime")], None, tmp_path / "process")
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(f"error: expected {module} to be installed"), result.stderr
