"""Saved models: every library's folder gives the model again, with its method, and without clipkernels a dense one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.artefacts.proof import answers_of
from clipkernels.data.tokenizer import ByteTokenizer
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower
from clipkernels.testing.towers import patch_ranking, patched_with
from tests.local_transformers import SIZES, clip_model, image_processor, save_clip_tokenizer
from tests.subprocesses import without_xdist

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
CONFIG: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}
RESNET = {"embed_dim": 32, "text_cfg": TEXT}
RESNET |= {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}}
TIMM_READS_FOLDERS = tuple(map(int, version("timm").split(".")[:3])) >= (1, 0, 31)
"""True if timm records the arguments of a model and reads safetensors from a folder."""
OPENAI = {"layers": 3, "size": 32, "patch": 8, "width": 64, "out": 32}


def bundled() -> Any:
    return ck.bundled()[0]


def clip(config: dict[str, Any], precision: str = "fp32") -> Any:
    """A CLIP of open_clip with random weights, in one of its precisions."""
    cast = open_clip.get_cast_dtype(precision)
    model = randomized(open_clip.CLIP(**config, cast_dtype=cast))
    if cast is not None:
        open_clip.model.convert_weights_to_lp(model, dtype=cast)
    return model.eval()


def openai(half: bool = False) -> Any:
    from clip.model import convert_weights

    model = randomized(openai_tower(**OPENAI))
    if half:
        convert_weights(model)
    return model


def recorded_by_timm(**arguments: Any) -> dict[str, Any]:
    """The arguments of `ck.save` for a model of timm that was created with these: none from timm 1.0.31 on."""
    return {} if TIMM_READS_FOLDERS else {"config": arguments}


MODELS: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "bundled": (bundled, ck.EViT(0.7, blocks=[1, 3]), {}),
    "bundled, predictor": (bundled, partial(patch_ranking, learnt=2), {}),
    "bundled, fp16": (lambda: bundled().half(), ck.ToMe((4, 2)), {}),
    "bundled, bf16": (lambda: bundled().bfloat16(), ck.TCA(0.1), {}),
    "open_clip": (lambda: clip(CONFIG), ck.EViT(0.5), {"config": CONFIG}),
    "open_clip, fp16": (lambda: clip(CONFIG, "fp16"), ck.EViT(0.5), {"config": CONFIG}),
    "open_clip, bf16": (lambda: clip(CONFIG, "bf16"), None, {"config": {"model_cfg": CONFIG}}),
    "open_clip, ResNet": (lambda: clip(RESNET), None, {"config": RESNET}),
    "OpenAI": (openai, ck.EViT(0.5), {}),
    "OpenAI, fp16": (lambda: openai(half=True), ck.Dense(), {}),
    "timm": (lambda: timm_tower("test_vit", 3, img_size=96), ck.EViT(0.5),
             recorded_by_timm(depth=3, img_size=96)),
    "timm, Eva": (lambda: timm_tower("eva02_tiny_patch14_224", 1), ck.EViT(0.7, blocks=(0,)),
                  recorded_by_timm(depth=1)),
    "timm, ResNet": (lambda: timm_tower("test_resnet", None), None, {}),
    "transformers": (clip_model, ck.EViT(0.5), {}),
    "transformers, fp16": (lambda: clip_model().half(), ck.ToMe(2), {}),
    "SigLIP": (lambda: randomized(transformers_tower("SiglipModel", 2, **SIZES)), ck.ToMe(2), {}),
    "projection": (
        lambda: randomized(transformers_tower("CLIPVisionModelWithProjection", 2, **SIZES)), ck.Dense(), {},
    ),
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A model by its name in MODELS, patched with its method, and the arguments of `ck.save`."""
    make, method, options = MODELS[name]
    if name.startswith(("transformers", "SigLIP", "projection")):
        pytest.importorskip("transformers", reason="transformers is not installed")
    if name.startswith("OpenAI"):
        pytest.importorskip("clip", reason="OpenAI's clip is not installed")
    torch.manual_seed(0)
    model = make()
    return (model if method is None else patched_with(model, method)), options


def method(model: nn.Module) -> Any:
    try:
        return ck.method_of(model)
    except ck.UnsupportedTower:
        return None


def dense_answers(model: Any) -> dict[str, Tensor]:
    """The embeddings of the host's own forward."""
    with suppress(ck.UnsupportedTower):
        ck.unpatch(model)
    return answers_of(model)


def host_alone(model: Any, folder: Path) -> Any:
    """The model of a folder, as its library alone loads it."""
    package = type(model).__module__.partition(".")[0]
    if package == "open_clip":
        return open_clip.create_model(f"local-dir:{folder}")
    if package == "clip":
        from clip.model import build_model

        return build_model(load_file(folder / "model.safetensors"))
    if package == "timm":
        import timm

        if not TIMM_READS_FOLDERS:
            pytest.skip("timm before 1.0.31 does not read folders with safetensors")
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    return type(model).from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_model_and_its_method(name: str, tmp_path: Path) -> None:
    model, options = made(name)
    expected, random_state = answers_of(model), torch.get_rng_state()
    ck.save(model, tmp_path / "tower", **options)
    loaded = ck.load(tmp_path / "tower")
    assert torch.equal(random_state, torch.get_rng_state())
    assert os.listdir(tmp_path) == ["tower"]
    answers = answers_of(loaded.model)
    assert answers.keys() == expected.keys()
    assert all(torch.equal(answers[key], expected[key]) for key in expected)
    weights = loaded.model.state_dict()
    assert {name: (tensor.dtype, tensor.sum()) for name, tensor in weights.items()} == {
        name: (tensor.dtype, tensor.sum()) for name, tensor in model.state_dict().items()
    }
    assert not loaded.model.training and repr(method(loaded.model)) == repr(method(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_library_alone_loads_a_dense_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, options = made(name)
    ck.save(model, tmp_path / "tower", **options)
    assert not [file for file in os.listdir(tmp_path / "tower") if file.endswith((".bin", ".pt", ".pkl", ".pth"))]
    host = host_alone(model, tmp_path / "tower").eval()
    assert method(host) is None
    # OpenAI's clip always loads half precision, the others float32 or the saved one.
    exact = all(p.dtype == q.dtype for p, q in zip(host.parameters(), model.parameters(), strict=True))
    own = dense_answers(model if exact else model.float())
    for key, answer in dense_answers(host if exact else host.float()).items():
        if exact or not name.startswith("OpenAI"):
            assert torch.equal(answer, own[key])
        else:
            assert torch.nn.functional.cosine_similarity(answer, own[key]).min() > 0.99


@pytest.mark.skipif(not TIMM_READS_FOLDERS, reason="timm before 1.0.31 does not read folders with safetensors")
def test_timm_reads_the_weights_only_if_they_are_asked_for(tmp_path: Path) -> None:
    import timm

    model, options = made("timm")
    ck.save(model, tmp_path / "tower", **options)
    expected = model.state_dict()["patch_embed.proj.weight"]
    for pretrained in (True, False):  # as docs/deployment.md says
        host = timm.create_model(f"local-dir:{tmp_path / 'tower'}", pretrained=pretrained)
        assert torch.equal(host.state_dict()["patch_embed.proj.weight"], expected) is pretrained


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    names = ("bundled, predictor", "timm", "OpenAI", "transformers")
    digests = {}
    for name in names:
        model, options = made(name)
        ck.save(model, tmp_path / name, **options)
        digests[name] = sha256(answers_of(model)["images"].numpy().tobytes()).hexdigest()
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import clipkernels as ck\n"
        "from hashlib import sha256\n"
        "from clipkernels.artefacts.proof import answers_of\n"
        "for folder in sys.argv[1:]:\n"
        "    print(sha256(answers_of(ck.load(folder).model)['images'].numpy().tobytes()).hexdigest())\n"
    )
    environment = {**without_xdist(os.environ), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == list(digests.values())


def test_the_bundled_model_carries_its_bytes(tmp_path: Path) -> None:
    model, preprocess, tokenizer = ck.bundled()
    ck.save(model, tmp_path / "tower", preprocess=preprocess)
    loaded = ck.load(tmp_path / "tower")
    texts = ["a photo of a cat.", "Ärger  im Zug", "€", "x" * 100, ""]
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert torch.equal(loaded.tokenizer(texts), tokenizer(texts))
    pytest.importorskip("transformers", reason="transformers is not installed")
    alone = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'tower'}")
    texts[1] = "Ärger im Zug"  # open_clip joins white space
    assert torch.equal(alone(texts), tokenizer(texts))


def test_tokenizer_and_image_processor_of_transformers_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer, processor = clip_model(), save_clip_tokenizer(tmp_path / "tokenizer"), image_processor()
    ck.save(ck.patch(model, ck.ToMe(2)), tmp_path / "tower", tokenizer=tokenizer, preprocess=processor)
    loaded = ck.load(tmp_path / "tower")
    assert loaded.tokenizer(["a cat."])["input_ids"] == tokenizer(["a cat."])["input_ids"]
    from PIL import Image

    image = Image.new("RGB", (40, 50), (10, 200, 30))
    assert torch.equal(loaded.preprocess(image), processor(image, return_tensors="pt")["pixel_values"][0])
    own = type(model).from_pretrained(tmp_path / "tower", local_files_only=True)
    assert ck.load_method(own, tmp_path / "tower") is own and ck.method_of(own) == ck.ToMe(2)


def test_a_method_goes_to_the_tower_that_it_was_saved_with(tmp_path: Path) -> None:
    model = bundled()
    ck.save(ck.patch(model, ck.EViT(0.7)), tmp_path / "tower")
    ck.save(ck.unpatch(model), tmp_path / "plain")
    for other in (bundled(), bundled().half()):
        assert ck.method_of(ck.load_method(other, tmp_path / "tower")) == ck.EViT(0.7)
        assert ck.method_of(ck.load_method(other, tmp_path / "plain")) is None
    other = bundled()
    with torch.no_grad():
        other.visual.proj.add_(1)
    with pytest.raises(ValueError, match=r"expected the tower of .* got another tower"):
        ck.load_method(other, tmp_path / "tower")
    assert ck.method_of(other) is None


def test_precisions_devices_and_modes_are_left_alone(tmp_path: Path) -> None:
    model = bundled().half().train()
    model.logit_scale.data = model.logit_scale.data.float()
    ck.save(ck.patch(model, ck.Dense()), tmp_path / "tower")
    assert model.training and ck.method_of(model) == ck.Dense()
    loaded = ck.load(tmp_path / "tower", device="cpu").model
    assert (loaded.logit_scale.dtype, loaded.visual.proj.dtype) == (torch.float32, torch.float16)


def test_wrappers_of_the_whole_model_are_left_out(tmp_path: Path) -> None:
    model = ck.patch(bundled(), ck.EViT(0.5))
    for name, wrapped in (("compiled", torch.compile(model)), ("parallel", nn.DataParallel(model))):
        ck.save(wrapped, tmp_path / name)
        assert type(ck.load(tmp_path / name).model) is open_clip.CLIP


def test_tied_weights_are_loaded(tmp_path: Path) -> None:
    model = clip(CONFIG)
    model.visual.transformer.resblocks[1].mlp = model.visual.transformer.resblocks[0].mlp
    ck.save(model, tmp_path / "tower", config=CONFIG)
    assert torch.equal(answers_of(ck.load(tmp_path / "tower").model)["images"], answers_of(model)["images"])


def report_of(folder: Path) -> Any:
    return json.loads((folder / "clipkernels.json").read_text())


def test_the_header_says_what_is_saved(tmp_path: Path) -> None:
    from clipkernels.measure.fidelity import Fidelity

    fidelity = Fidelity((0.9, 0.95), None, 0.25, True)
    ck.save(ck.patch(bundled(), ck.EViT(0.7)), tmp_path / "a" / "tower", fidelity=fidelity)
    header = report_of(tmp_path / "a" / "tower")
    assert header["method"]["name"] == "EViT" and header["method"]["arguments"]["keep"] == 0.7
    assert header["plan"]["tokens"] == list(ck.EViT(0.7).plan(65, 6).tokens)
    assert header["fidelity"] == {"cosine": [0.9, 0.95], "precision": None, "agreement": 0.25, "finite": True}
    assert header["versions"]["clipkernels"] == ck.__version__
    assert set(header["files"]) == set(os.listdir(tmp_path / "a" / "tower")) - {"clipkernels.json"}
    with pytest.raises(ValueError, match="expected a fidelity report that JSON can hold"):
        ck.save(bundled(), tmp_path / "b", fidelity={"x": torch.ones(1)})
    with pytest.raises(ValueError, match="expected a fidelity report that JSON can hold"):
        ck.save(bundled(), tmp_path / "b", fidelity={"x": float("nan")})
    assert os.listdir(tmp_path) == ["a"]


def test_open_clip_names_a_model_of_its_own(registered: str, tmp_path: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(registered)
    tokenizer = open_clip.get_tokenizer(registered)
    ck.save(model, tmp_path / "tower", config=registered, tokenizer=tokenizer, preprocess=preprocess)
    loaded = ck.load(tmp_path / "tower")
    assert torch.equal(loaded.tokenizer(["a cat"]), tokenizer(["a cat"]))
    assert repr(loaded.preprocess).replace("[", "(").replace("]", ")") == repr(preprocess)
    mean = {"mean": [0.5, 0.5, 0.5]}
    ck.save(model, tmp_path / "tower", config=registered, preprocess=mean)
    assert "mean=[0.5, 0.5, 0.5]" in repr(ck.load(tmp_path / "tower").preprocess)
    with pytest.raises(ValueError, match="expected a preprocessing with the pixels of the folder's"):
        ck.save(model, tmp_path / "other", config=registered, preprocess=ck.load(tmp_path / "tower").preprocess)


def test_timm_towers_in_open_clip_are_saved(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    config = {**CONFIG, "vision_cfg": vision}
    model = open_clip.CLIP(**{**config, "vision_cfg": {**vision, "timm_model_pretrained": False}}).eval()
    ck.save(ck.patch(model, ck.ToMe(2)), tmp_path / "tower", config=config)
    assert torch.equal(answers_of(ck.load(tmp_path / "tower").model)["images"], answers_of(model)["images"])


def test_a_coca_is_saved(tmp_path: Path) -> None:
    model = open_clip_tower("coca_ViT-B-32", 1, width=64, head_width=32, patch_size=56)
    with pytest.raises(ValueError, match="expected config"):
        ck.save(model, tmp_path / "tower")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    ck.save(ck.patch(bundled(), ck.EViT(0.7)), folder)
    file = folder / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["visual.conv1.weight"].view(-1)[5] += 1e-3
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"got another open_clip_model.safetensors \(its SHA-256 differs\)"):
        ck.load(folder)


def test_a_header_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    ck.save(ck.patch(bundled(), ck.EViT(0.7)), folder)
    file = folder / "clipkernels.json"
    text = file.read_text()
    for old, new, message in (
        ('"keep": 0.7', '"keep": 0.5', "another header than was written"),
        ("clipkernels.artefact.1", "clipkernels.artefact.2", "which a newer clipkernels wrote: update this one"),
        ('"library": "open_clip"', '"library": "pickle"', "Invalid enum value 'pickle'"),
    ):
        file.write_text(text.replace(old, new))
        for read in (ck.load, partial(ck.load_method, bundled())):
            with pytest.raises(ValueError, match=message):
                read(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"expected a folder that ck.save wrote, got .* without clipkernels.json"):
        ck.load(folder)
