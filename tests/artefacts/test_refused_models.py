"""Models and folders that `ck.save` refuses, and writes that fail: nothing appears, nothing is lost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.artefacts import folders
from clipkernels.artefacts.method_records import METHODS, Record, read_method, record_method
from clipkernels.testing.towers import patch_ranking

pytestmark = pytest.mark.usefixtures("one_thread")
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
CONFIG: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}


@dataclass(frozen=True)
class Halve:
    """A user's method."""

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> ck.Plan:
        return ck.Plan((ck.Prune((tokens - prefix) // 2), *[None] * (blocks - 1)), tokens, prefix)


class Sharded(torch.Tensor):
    """A tensor subclass, as those of DTensor and of torchao are."""


def refused(model: Any, folder: Path, message: str, **options: Any) -> None:
    """Check that `ck.save` raises one line and leaves nothing."""
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=message) as caught:
        ck.save(model, folder / "tower", **options)
    assert "\n" not in str(caught.value) and sorted(os.listdir(folder)) == before


def test_a_method_of_a_user_is_refused(tiny: Any, tmp_path: Path) -> None:
    ck.patch(tiny, Halve())
    refused(tiny, tmp_path, "expected a built-in method .*, got Halve, which JSON cannot rebuild")
    assert ck.method_of(tiny) == Halve()

    @dataclass(frozen=True)
    class EViT(ck.EViT):
        """A subclass with the name of its base."""

    refused(ck.patch(tiny, EViT(0.5)), tmp_path, "expected a built-in method")


@pytest.mark.parametrize("method", [
    ck.Dense(), ck.EViT(1, blocks=(0, 2), fuse=False, score="random", seed=3), ck.TCA(0.1, seed=None, multiple=8),
    ck.ToMe([3, 2, 1]), ck.ToMe(4, inflect=-0.5, proportional=False),
])  # fmt: skip
def test_methods_are_equal_after_json(method: Any, tmp_path: Path) -> None:
    assert read_method(record_method(method), tmp_path) == method


def test_a_record_reads_nothing_that_it_names(tmp_path: Path) -> None:
    assert set(METHODS) == {"Dense", "EViT", "PatchRanking", "Schedule", "TCA", "ToMe"}
    for record, message in (
        (Record("os.system", {"command": "true"}), "expected a built-in method .* got 'os.system'"),
        (Record("EViT", {"keep": 0.5, "tokens": 3}), "expected arguments of EViT, got 'tokens'"),
        (Record("EViT", {}), "expected the arguments of EViT"),
        (Record("EViT", {"keep": 7}), "keep must be"),
        (Record("EViT", {}, ["keep"]), "expected arguments of EViT, got 'keep'"),
        (Record("PatchRanking", {"predictor": "x"}), "expected the arguments of PatchRanking"),
    ):
        with pytest.raises(ValueError, match=message):
            read_method(record, tmp_path)


def test_adapters_and_quantised_weights_are_refused(tiny: Any, tmp_path: Path) -> None:
    quantised = ck.bundled()[0]
    quantised.visual.proj = nn.Parameter(quantised.visual.proj.detach().char(), requires_grad=False)
    refused(quantised, tmp_path, "expected weights in float32, float16 or bfloat16, got visual.proj as torch.int8")
    quantised.visual.proj = nn.Parameter(tiny.visual.proj.detach().as_subclass(Sharded))
    refused(quantised, tmp_path, "got visual.proj as Sharded: save before quantising or sharding")
    refused(tiny.double(), tmp_path, "expected weights in float32, .* as torch.float64")
    refused(ck.bundled()[0].to("meta"), tmp_path, "on the meta device: load them first")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = ck.bundled()[0]
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"], r=2))
    refused(lora, tmp_path, "expected a whole model of open_clip|merge_and_unload")
    refused(model, tmp_path, "expected a model without adapters, got .*: call merge_and_unload")
    merged = lora.merge_and_unload()
    ck.save(merged, tmp_path / "tower")
    assert type(ck.load(tmp_path / "tower").model) is open_clip.CLIP


def test_parts_and_strangers_are_refused(tiny: Any, tmp_path: Path) -> None:
    for model in (tiny.visual, nn.Sequential(tiny), nn.Linear(2, 2)):
        with pytest.raises(ck.UnsupportedTower, match="expected a whole model of open_clip, transformers, timm or"):
            ck.save(model, tmp_path / "tower")
    tiny.visual = torch.compile(tiny.visual)
    refused(tiny, tmp_path, "expected modules of the library, got OptimizedModule at visual: compile after ck.load")
    assert not os.listdir(tmp_path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    refused(model, tmp_path, "expected config, open_clip's name of the model", config=None)
    refused(model, tmp_path, r"config must be a dict or one of open_clip's models \(ViT-B", config="ViT-B")
    refused(model, tmp_path, "config must have embed_dim, vision_cfg and text_cfg, got none of text_cfg",
            config={"embed_dim": 1, "vision_cfg": {}})  # fmt: skip
    wrong = {"quick_gelu": False}, {"vision_cfg": {**VISION, "layers": 3}}, {"embed_dim": 17}
    for change in wrong:
        refused(model, tmp_path, "got one that does not load: check config", config={**CONFIG, **change})
    heads = {**CONFIG, "vision_cfg": {**VISION, "head_width": 64}}
    refused(model, tmp_path, "embeddings of images differ by up to .* check config", config=heads)


def test_a_tokenizer_that_the_folder_cannot_give_is_refused(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**CONFIG, "text_cfg": {**TEXT, "vocab_size": 300}}).eval()
    config = {**CONFIG, "text_cfg": {**TEXT, "vocab_size": 300}}
    refused(model, tmp_path, "because the text tower has 300 ids, not those of open_clip's BPE", config=config)
    config = {**CONFIG, "text_cfg": {**TEXT, "hf_tokenizer_name": "google/some"}}
    model = open_clip.CLIP(**config).eval()
    refused(model, tmp_path, "because the configuration names google/some, which is no part", config=config)
    refused(model, tmp_path, "expected a tokenizer with the ids of the folder's", config=CONFIG,
            tokenizer=lambda texts: torch.ones(len(texts), 16, dtype=torch.int64))  # fmt: skip
    timm = pytest.importorskip("timm", reason="timm is not installed")
    refused(timm.create_model("test_vit"), tmp_path, "tokenizer must be None for timm", tokenizer=open_clip.tokenize)


def test_a_folder_with_other_files_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    refused(tiny, tmp_path, "got .*tower with 'notes.txt' and no clipkernels.json: choose another one")
    (folder / "notes.txt").unlink()
    ck.save(tiny, folder)
    (folder / "notes.txt").write_text("mine")
    refused(tiny, tmp_path, "got .*tower with 'notes.txt' too: move it, or choose another folder")
    assert (folder / "notes.txt").read_text() == "mine" and ck.load(folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="which is no folder"):
        ck.save(tiny, tmp_path / "file")
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(ValueError, match="which is no folder"):
        ck.save(tiny, tmp_path / "loop")


def test_a_link_stays_and_its_folder_is_replaced(tiny: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for target in ("tower", "new"):
        (tmp_path / "link").unlink(missing_ok=True)
        os.symlink(disk / target, tmp_path / "link")  # to no folder at first
        for method in (None, ck.ToMe(4)):
            ck.save(tiny if method is None else ck.patch(tiny, method), tmp_path / "link")
            loaded = [ck.method_of(ck.load(folder).model) for folder in (tmp_path / "link", disk / target)]
            assert loaded == [method, method]
        ck.unpatch(tiny)
        assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert sorted(os.listdir(disk)) == ["new", "tower"]
    (disk / "new" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new with 'notes\.txt' too"):
        ck.save(tiny, tmp_path / "link")


def test_an_artefact_is_replaced_whole(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tower"
    ck.save(ck.patch(tiny, patch_ranking(tiny)), folder)
    assert "predictor.safetensors" in os.listdir(folder)

    def fail(*arguments: Any) -> None:
        raise OSError("no space left")

    for name in ("_flush", "_exchange"):
        with monkeypatch.context() as patch:
            patch.setattr(folders, name, fail)
            with pytest.raises(OSError, match="no space left"):
                ck.save(ck.unpatch(tiny), folder)
        assert os.listdir(tmp_path) == ["tower"] and ck.method_of(ck.load(folder).model) is not None
    rename, renamed = os.rename, []

    def fail_second(before: Any, after: Any) -> None:
        renamed.append(after)
        if len(renamed) == 2:
            fail()
        rename(before, after)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_second)
        with pytest.raises(OSError, match="no space left"):
            ck.save(tiny, folder)
    assert len(renamed) == 3  # the artefact is back in its place
    assert os.listdir(tmp_path) == ["tower"] and ck.method_of(ck.load(folder).model) is not None
    ck.save(tiny, folder)
    assert os.listdir(tmp_path) == ["tower"] and "predictor.safetensors" not in os.listdir(folder)
    assert ck.method_of(ck.load(folder).model) is None
