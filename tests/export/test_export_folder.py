"""`ck.export`: the files of a folder, their parity with PyTorch, refusals, precisions and layouts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels.artefacts.folders import check_replaceable
from clipkernels.data import digits
from clipkernels.exporting import export as export_module
from clipkernels.exporting import packages, towers
from clipkernels.exporting.header import EXPORTS
from clipkernels.exporting.immich import pad_token, preprocess_cfg
from clipkernels.exporting.onnx import drop_expands
from clipkernels.exporting.openvino import operators
from clipkernels.fingerprint import fingerprint, same_tower
from clipkernels.runtime import Runtime
from clipkernels.testing import openai_tower, randomized, timm_tower
from tests.local_transformers import clip_model, image_processor, save_clip_tokenizer

onnx, onnxruntime, _ = (
    pytest.importorskip(name, reason=f"{name} is not installed") for name in ("onnx", "onnxruntime", "onnxscript")
)
pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a photo of a cat.", "Ärger & co, 7 days", "x" * 300]
METHODS = {"host": None, "Dense": ck.Dense(), "EViT": ck.EViT(0.7), "ToMe": ck.ToMe(2), "TCA": ck.TCA(0.1)}


def small() -> Any:
    """A CLIP of open_clip with two blocks and a text tower of bytes."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 259, "width": 32, "heads": 1, "layers": 1}
    return randomized(open_clip.CLIP(16, vision, text)).eval()


def preprocess() -> Any:
    from open_clip.transform import image_transform

    return image_transform(32, is_train=False, resize_mode="shortest", interpolation="bicubic")


def tokenizer(length: int = 16) -> Any:
    from clipkernels.data.tokenizer import ByteTokenizer

    return ByteTokenizer(length)


def noise(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A small model with EViT, the folder that it is exported to in ONNX, and the report."""
    model = ck.patch(small(), ck.EViT(0.5, blocks=(0,)))
    folder = tmp_path_factory.mktemp("export") / "out"
    steps: list[str] = []
    parts = {"tokenizer": tokenizer(), "preprocess": preprocess(), "config": {"layers": 2}}
    report = ck.export(model, folder, progress=steps.append, **parts)
    assert steps == ["embeddings of PyTorch", "image graph", "text graph", "comparison with PyTorch"]
    return model, folder, report


@torch.no_grad()
def test_one_file_gives_the_embeddings_at_every_batch_size(exported: tuple[Any, Path, Any]) -> None:
    model, folder, _ = exported
    runtime = Runtime(folder)
    for count in (1, 3, 8):
        images = noise(count)
        actual = runtime.encode_image(list(images.numpy()))
        assert np.abs(actual - model.encode_image(images).numpy()).max() < 1e-5
    ids = runtime.tokenize(TEXTS)
    assert np.array_equal(ids, tokenizer()(TEXTS).numpy())
    assert np.abs(runtime.encode_text(TEXTS) - model.encode_text(torch.from_numpy(ids)).numpy()).max() < 1e-5


def test_export_json_says_what_the_folder_holds(exported: tuple[Any, Path, Any]) -> None:
    model, folder, report = exported
    content = json.loads((folder / "export.json").read_text())
    assert content["image"] == {
        "file": "image.onnx", "input": "pixel_values", "output": "image_embeds", "width": 16, "size": [32, 32],
    }  # fmt: skip
    assert content["text"] == {
        "file": "text.onnx", "input": "input_ids", "output": "text_embeds", "width": 16,
        "context_length": 16, "dtype": "int64",
    }  # fmt: skip
    assert content["name"] == {"library": "open_clip", "model": "CLIP", "config": {"layers": 2}}
    assert content["method"] == str(ck.EViT(0.5, blocks=(0,)))
    assert content["plan"]["tokens"] == [17, 10, 10]
    assert content["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    assert same_tower(content["tower"], fingerprint(model))
    assert same_tower(content["text_tower"], fingerprint(model, "text"))
    assert content["report"] == json.loads(json.dumps(report.record()))
    assert content["files"].keys() >= {
        "README.md",
        "image.onnx",
        "requirements.txt",
        "runtime/__init__.py",
        "text.onnx",
    }
    assert (folder / "requirements.txt").read_text().split() == ["numpy", "onnxruntime>=1.20", "pillow", "tokenizers"]


def test_the_report_has_parity_sizes_memory_and_no_slow_nodes(exported: tuple[Any, Path, Any]) -> None:
    _, folder, report = exported
    for parity in (report.image, report.text):
        assert parity.inputs == 12 and parity.near == 1 and parity.cosine_min > 0.999999 and parity.error < 1e-5
    assert {name: report.nodes[name] for name in ("scatter", "nonzero", "loop", "if")} == dict.fromkeys(
        ("scatter", "nonzero", "loop", "if"), 0
    )
    assert report.nodes["nodes"] == len(onnx.load(folder / "image.onnx").graph.node)
    assert report.sizes["image.onnx"] == (folder / "image.onnx").stat().st_size
    assert sys.platform != "linux" or 2**25 < report.peak_memory < 2**29
    assert report.seconds.keys() == {"image", "text"} and report.products is None


def test_a_graph_says_nothing_of_the_machine_that_made_it(exported: tuple[Any, Path, Any]) -> None:
    _, folder, _ = exported
    for name in ("image.onnx", "text.onnx"):
        content = (folder / name).read_bytes()
        assert b"/site-packages/" not in content and b"clipkernels" not in content


def test_a_folder_with_a_file_of_somebody_else_is_left_alone(exported: tuple[Any, Path, Any]) -> None:
    _, folder, _ = exported
    check_replaceable(folder, EXPORTS)
    (folder / "runtime" / "__pycache__").mkdir(exist_ok=True)
    (folder / "runtime" / "__pycache__" / "x.pyc").write_bytes(b"")
    check_replaceable(folder, EXPORTS)
    other = folder / "runtime" / "notes.txt"
    other.write_text("mine")
    try:
        with pytest.raises(ValueError, match=r"one that ck\.export wrote, got .* with 'runtime/notes.txt' too"):
            check_replaceable(folder, EXPORTS)
    finally:
        other.unlink()


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "runtime": ({"to": "tflite"}, 'to must be "onnx", "openvino" or "pt2", got \'tflite\''),
    "precision": ({"precision": "fp16"}, 'precision must be "fp32", "bf16" or "int8", got \'fp16\''),
    "layout": ({"layout": "rclip"}, "layout must be None or \"immich\", got 'rclip'"),
    "bf16": ({"precision": "bf16"}, 'got "bf16", whose products onnxruntime lacks on a CPU: use to="openvino"'),
    "int8": (
        {"to": "pt2", "precision": "int8"},
        'got "int8": quantise the patched model with torchao, or use to="openvino"',
    ),
    "no images": ({"precision": "int8"}, "expected calibrate=, images whose activations"),
    "images": ({"calibrate": noise(2)}, 'expected precision="int8" with calibrate, got "fp32"'),
    "immich": ({"to": "openvino", "layout": "immich"}, 'expected to="onnx" with layout="immich"'),
    "limit": ({"min_cosine": 1.5}, "min_cosine must be a number in [0, 1], got 1.5"),
    "no preprocess": ({"preprocess": None}, "expected preprocess=, because this model of open_clip carries none"),
    "length": ({"tokenizer": tokenizer(20)}, "tokenizer must give texts of at most 16 tokens, got 20"),
    "config": ({"config": {"a": float("nan")}}, "config must be what JSON can hold, got"),
    "nan": ({"check": noise(2).log()}, "check: images must be finite, got NaN or infinity"),
    "size": ({"check": noise(2, 64)}, "images must be (B,3,32,32), got (2,3,64,64)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_argument_is_one_line_and_no_folder(case: str, tmp_path: Path) -> None:
    options, message = CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.export(small(), tmp_path / "out", **{"preprocess": preprocess(), **options})
    assert not list(tmp_path.iterdir())


WEIGHTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (lambda model: model.to("meta"), "expected a model with weights, got one on the meta device: load"),
    "image": (lambda model: model.visual.proj.data.fill_(torch.nan), "expected finite image_embeds of the model"),
    "text": (
        lambda model: model.text_projection.data.fill_(torch.inf),
        "expected finite text_embeds of the model",
    ),
    "scale": (lambda model: model.logit_scale.data.fill_(torch.inf), "the model's logit_scale must be one finite"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_give_no_embeddings_are_refused_at_once(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "write_image", None)
    model = small().train()
    spoil, message = WEIGHTS[case]
    spoil(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.export(model, tmp_path / "out", preprocess=preprocess())
    assert not list(tmp_path.iterdir()) and model.training


def test_a_compiled_model_is_exported_without_its_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = ck.compile(small()), []

    def write(module: Any, file: Path, *_: Any) -> None:
        calls.append(ck.compilation_of(model))
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "write_image", write)
    before = ck.compilation_of(model)
    with pytest.raises(OSError, match="disk full"):
        ck.export(model, tmp_path / "out", preprocess=preprocess())
    assert calls == [None] and before is not None and ck.compilation_of(model) is before and not before.costs
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "nncf" else name)
    with pytest.raises(ImportError, match=r"expected 'openvino', 'nncf' for this export, got no 'nncf': pip install"):
        packages.needed("openvino", "nncf")


def test_other_embeddings_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(export_module, "write_image", lambda module, file, *_: file.write_bytes(b"graph"))
    monkeypatch.setattr(export_module, "write_text", lambda module, file, *_: file.write_bytes(b"graph"))
    monkeypatch.setattr(export_module, "count_slow", lambda operators: {"nodes": 1})
    monkeypatch.setattr("clipkernels.exporting.onnx.operators", lambda file: {})
    monkeypatch.setattr(towers, "load_engine", lambda *_: lambda batch: np.ones((len(batch), 16), np.float32))
    with pytest.raises(ValueError, match=r"expected PyTorch's embeddings from image\.onnx, got cosines of"):
        ck.export(model.train(), tmp_path / "out", preprocess=preprocess())
    assert not list(tmp_path.iterdir())
    assert model.training and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_preprocessing_in_immichs_form() -> None:
    resize = {"op": "resize", "size": 224, "mode": "shortest", "interpolation": "bicubic"}
    crop = {"op": "center_crop", "size": [224, 224]}
    end = [{"op": "to_float"}, {"op": "normalize", "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}]
    assert preprocess_cfg([resize, crop, *end]) == {
        "size": [224, 224], "mode": "RGB", "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bicubic",
        "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    squash = {**resize, "mode": "squash", "size": [32, 32]}
    assert preprocess_cfg([squash, *end])["resize_mode"] == "squash"
    for steps in ([{**resize, "mode": "longest"}, crop, *end], [resize, *end], [{**resize, "size": 256}, crop, *end]):
        with pytest.raises(ValueError, match='layout="immich"'):
            preprocess_cfg(steps)


def test_copies_of_rows_are_dropped_where_an_addition_repeats_them() -> None:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Expand", ["row", "shape"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["y"]),
        helper.make_node("Add", ["small", "rows"], ["z"]),
    ]
    sizes = {"row": (1, 3), "small": (1, 3), "x": (2, 3), "rows": (2, 3), "y": (2, 3), "z": (2, 3)}
    values = {name: helper.make_tensor_value_info(name, floats, size) for name, size in sizes.items()}
    shape = onnx.numpy_helper.from_array(np.array([2, 3]), "shape")
    inputs, outputs = [values["row"], values["small"], values["x"]], [values["y"], values["z"]]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [shape], value_info=[values["rows"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feed = {name: np.random.default_rng(0).random(sizes[name], np.float32) for name in ("row", "small", "x")}
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    drop_expands(model)
    # The second addition needs the copies.
    assert [list(node.input) for node in model.graph.node] == [["row", "shape"], ["x", "row"], ["small", "rows"]]
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    del model.graph.node[2], model.graph.output[1]
    drop_expands(model)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_the_token_that_pads_is_found_by_its_id() -> None:
    assert pad_token({"added_tokens": [{"id": 3, "content": "<pad>"}], "model": {"vocab": {"a": 0}}}, 3) == "<pad>"
    assert pad_token({"model": {"vocab": {"!": 0, "a": 1}}}, 0) == "!"
    assert pad_token({"model": {"vocab": [["<s>", 0.0], ["<pad>", 0.0]]}}, 1) == "<pad>"
    with pytest.raises(ValueError, match="got the id 7 without one"):
        pad_token({"model": {"vocab": {"!": 0}}}, 7)


def hugging_face(folder: Path) -> tuple[Any, dict[str, Any]]:
    return clip_model(), {"tokenizer": save_clip_tokenizer(folder / "tokenizer"), "preprocess": image_processor()}


LIBRARIES: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "open_clip": lambda folder: (small(), {"tokenizer": tokenizer(), "preprocess": preprocess()}),
    "transformers": hugging_face,
    "timm": lambda folder: (
        randomized(
            timm_tower(
                "vit_base_patch16_siglip_224", 2, embed_dim=64, num_heads=2, img_size=32, patch_size=8, num_classes=24
            )
        ),
        {"preprocess": preprocess()},
    ),
    "openai": lambda folder: (randomized(openai_tower(2, 32, 8, 64, 32)).float(), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_a_tower_of_every_library_keeps_its_embeddings(library: str, method: str, to: str, tmp_path: Path) -> None:
    model, parts = LIBRARIES[library](tmp_path)
    if METHODS[method] is not None:
        ck.patch(model, METHODS[method])
    images = torch.cat([noise(30), 2 * noise(40)[30:]])
    report = ck.export(model, tmp_path / "out", to=to, check=images, **parts)
    assert report.image.inputs == 40 and report.image.near >= (0.9 if method in ("EViT", "ToMe", "TCA") else 1)
    assert (report.text is None) == (library == "timm")
    assert report.text is None or report.text.near == 1
    assert report.nodes["nonzero"] == report.nodes["loop"] == report.nodes["if"] == report.nodes["scatter"] == 0


@pytest.mark.slow
def test_openvino_recognises_the_attention_with_sizes(tmp_path: Path) -> None:
    model = ck.patch(small(), ck.ToMe(2))
    ck.export(model, tmp_path / "out", to="openvino", tokenizer=tokenizer(), preprocess=preprocess())
    # The first block has no sizes yet, the second one has.
    assert operators(tmp_path / "out" / "image.xml")["ScaledDotProductAttention"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_program_of_torch_gives_the_embeddings(precision: str, tmp_path: Path) -> None:
    model = ck.patch(small(), ck.ToMe(2))
    parts = {"tokenizer": tokenizer(), "preprocess": preprocess()}
    report = ck.export(model, tmp_path / "out", to="pt2", precision=precision, **parts)
    assert report.image.cosine_min > (0.99999 if precision == "fp32" else 0.95)
    actual = Runtime(tmp_path / "out").encode_image(list(noise(3).numpy()))
    expected = model.encode_image(noise(3)).numpy()
    assert np.abs(actual - expected).max() < (1e-5 if precision == "fp32" else 0.3) * np.abs(expected).max()
    assert Runtime(tmp_path / "out").encode_image(noise(1500).numpy(), batch_size=1500).shape == (1500, 16)


@pytest.mark.slow
def test_bf16_of_openvino_halves_the_weights(tmp_path: Path) -> None:
    model, parts = ck.bundled()[0], {"preprocess": ck.bundled()[1], "tokenizer": ck.bundled()[2]}
    ck.patch(model, ck.EViT(0.7))
    full = ck.export(model, tmp_path / "out", to="openvino", check=photographs(parts["preprocess"], 100), **parts)
    half = ck.export(
        model, tmp_path / "out", to="openvino", precision="bf16", check=photographs(parts["preprocess"], 100), **parts
    )
    assert half.sizes["image.bin"] < 0.52 * full.sizes["image.bin"]
    assert half.image.cosine_mean > 0.995 and half.precision == "bf16"


def photographs(transform: Any, count: int) -> Tensor:
    """Preprocessed digits, which the bundled model knows."""
    images = digits.load(True).images[:count]
    pictures = [Image.fromarray(np.asarray(image)).convert("RGB") for image in images]
    return torch.stack([transform(picture) for picture in pictures])


@pytest.mark.slow
def test_int8_of_openvino_quantises_products_with_a_weight_alone(tmp_path: Path) -> None:
    model, transform, tokens = ck.bundled()
    ck.patch(model, ck.EViT(0.7))
    images = photographs(transform, 200)
    options = {"to": "openvino", "precision": "int8", "calibrate": images[:100], "check": images[100:]}
    report = ck.export(model, tmp_path / "out", tokenizer=tokens, preprocess=transform, **options)
    # One patch embedding, four products in each of six blocks, one more in the last, whose query is apart; the head.
    assert report.products == (27, ())
    assert report.image.cosine_p1 > 0.98 and report.text.cosine_min > 0.99
    floats = sum(parameter.numel() for parameter in model.visual.parameters())
    assert report.sizes["image.bin"] < 1.3 * floats
    limit = (1 + report.image.cosine_p1) / 2
    kept = ck.export(model, tmp_path / "out", tokenizer=tokens, preprocess=transform, min_cosine=limit, **options)
    assert kept.image.cosine_p1 >= limit
    assert kept.products.float_names and kept.products.quantised + len(kept.products.float_names) == 27


@pytest.mark.slow
def test_int8_of_onnxruntime_quantises_products_with_a_weight_alone(tmp_path: Path) -> None:
    model, transform, tokens = ck.bundled()
    ck.patch(model, ck.ToMe(4))
    images = photographs(transform, 200)
    options = {"precision": "int8", "calibrate": images[:100], "check": images[100:]}
    report = ck.export(model, tmp_path / "out", tokenizer=tokens, preprocess=transform, **options)
    assert report.products == (27, ()) and report.image.cosine_p1 > 0.95 and report.text.cosine_min > 0.99
    for part, tower in (("image", model.visual), ("text", model.transformer)):
        assert report.sizes[f"{part}.onnx"] < 1.5 * sum(parameter.numel() for parameter in tower.parameters())
    with pytest.raises(
        ValueError, match=r"expected a first percentile of the cosine with fp32 of at least 0\.9999, got"
    ):
        ck.export(model, tmp_path / "other", tokenizer=tokens, preprocess=transform, min_cosine=0.9999, **options)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@torch.no_grad()
def test_immich_finds_its_files_and_normalised_embeddings(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model, transform, tokens = ck.bundled()
    ck.patch(model, ck.ToMe(4))
    ck.export(model, tmp_path / "out", tokenizer=tokens, preprocess=transform, layout="immich")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    length = config["text_cfg"]["context_length"]
    textual = tmp_path / "out" / "textual"
    pad = json.loads((textual / "tokenizer_config.json").read_text())["pad_token"]
    tokenize = Tokenizer.from_file(str(textual / "tokenizer.json"))
    tokenize.enable_padding(length=length, pad_token=pad, pad_id=tokenize.token_to_id(pad))
    tokenize.enable_truncation(max_length=length)
    session = onnxruntime.InferenceSession(textual / "model.onnx")
    for text in TEXTS:
        [[actual]] = session.run(None, {"text": np.array([tokenize.encode(text).ids], np.int32)})
        expected = normalize(model.encode_text(tokens([text])), dim=1)[0]
        assert np.abs(actual - expected.numpy()).max() < 1e-5
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "visual" / "model.onnx")
    [[actual]] = session.run(None, {"image": transform(picture)[None].numpy()})
    expected = normalize(model.encode_image(transform(picture)[None]), dim=1)[0]
    assert np.abs(actual - expected.numpy()).max() < 1e-5
    config = json.loads((tmp_path / "out" / "visual" / "preprocess_cfg.json").read_text())
    assert config["size"] == [32, 32] and config["resize_mode"] == "shortest" and config["interpolation"] == "bicubic"


def test_a_folder_runs_without_torch_and_without_clipkernels(exported: tuple[Any, Path, Any], tmp_path: Path) -> None:
    model, folder, _ = exported
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "photo.png")
    code = """
import json, sys
sys.modules["torch"] = sys.modules["clipkernels"] = None
from runtime import Runtime
folder = Runtime(sys.argv[1])
print(json.dumps([folder.encode_image([sys.argv[2]]).tolist(), folder.encode_text(["a cat"]).tolist()]))
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "photo.png")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    image, text = json.loads(result.stdout)
    with torch.no_grad():
        expected = model.encode_image(preprocess()(Image.open(tmp_path / "photo.png"))[None])
        assert np.abs(np.array(image) - expected.numpy()).max() < 1e-5
        assert np.abs(np.array(text) - model.encode_text(tokenizer()(["a cat"])).numpy()).max() < 1e-5


def test_torch_2_6_does_not_write_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    model, preprocess, _ = ck.bundled()
    with pytest.raises(ValueError, match=r"expected a newer torch than 2\.6 for pt2, got 2\.6\.0\+cpu: take onnx"):
        ck.export(model, tmp_path / "out", to="pt2", preprocess=preprocess)
    assert not list(tmp_path.iterdir())
