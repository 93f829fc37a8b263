"""Support sets: generation."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch.nn.functional import normalize

from clipkernels import support
from clipkernels.support import SupportSet, diffusion
from tests.support.fixtures import contents, names, retrieve

pytestmark = pytest.mark.usefixtures("one_thread")


class Spy:
    """A pipeline that records its calls and flags those for which `flagged` is true."""

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
    support_set = support.generate(*bundled[:2], {"apple": ["a fruit."]}, spy, tmp_path / "set", per_class=1)
    assert (spy.calls[0]["guidance_scale"], spy.calls[0]["num_inference_steps"]) == (9.5, 85)
    assert support_set.about["settings"].items() >= {"guidance": 9.5, "steps": 85, "per_class": 1}.items()
    assert support.generate.__kwdefaults__ is not None and support.generate.__kwdefaults__["per_class"] == 100


def test_prompts_alternate_and_every_image_has_its_own_seed(bundled: Any, stable: Any, tmp_path: Path) -> None:
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


def test_generated_images_match_the_pipelines(bundled: Any, stable: Any, tmp_path: Path) -> None:
    spy = Spy(stable)
    support_set = generate(bundled, spy, tmp_path / "set")
    noise = torch.Generator().manual_seed(spy.seeds[1])
    (expected,) = stable(prompt=["some stripes."], guidance_scale=9.5, num_inference_steps=2, generator=[noise]).images
    with Image.open(tmp_path / "set" / "zebra" / "0001.png") as image:
        assert image.tobytes() == expected.tobytes()
        recipe = json.loads(image.info["clipkernels"])
    assert recipe.items() >= {"prompt": "some stripes.", "index": 1, "seed": 0, "attempt": 0}.items()
    assert names(support_set) == 2 * [["0000.png", "0001.png", "0002.png", "0003.png"]]
    with torch.no_grad():
        images = torch.stack([bundled[1](Image.open(image.path)) for image in support_set.images])
        torch.testing.assert_close(support_set.features, normalize(bundled[0].encode_image(images), dim=1))


def test_a_generated_set_is_saved_and_loads(bundled: Any, stable: Any, tmp_path: Path) -> None:
    support_set = generate(bundled, stable, tmp_path / "set")
    loaded = SupportSet.load(tmp_path / "set", bundled[0])
    assert loaded.about["kind"] == "SD" and loaded.classes == ("zebra", "apple")
    assert torch.equal(loaded.features, support_set.features) and loaded.labels.tolist() == 4 * [0] + 4 * [1]


def test_an_interrupted_generation_resumes_with_identical_files(
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


def test_more_images_per_class_keep_the_existing_ones(bundled: Any, stable: Any, tmp_path: Path) -> None:
    few = generate(bundled, Spy(stable), tmp_path / "set", per_class=2)
    before, spy = contents(tmp_path / "set"), Spy(stable)
    support_set = generate(bundled, spy, tmp_path / "set")
    expected_set = generate(bundled, Spy(stable), tmp_path / "whole")
    assert len(spy.calls) == 4
    after, expected = contents(tmp_path / "set"), contents(tmp_path / "whole")
    manifest, expected_manifest = (json.loads(files.pop("manifest.json")) for files in (after, expected))
    for files in (before, after, expected):
        files.pop("features.safetensors")
    assert after == expected and all(after.get(name) == before[name] for name in before.keys() - {"manifest.json"})
    assert torch.equal(support_set.features[[0, 1, 4, 5]], few.features)
    # The other features were encoded in another batch, and products of other sizes round differently.
    torch.testing.assert_close(support_set.features, expected_set.features)
    for part in (manifest, expected_manifest, manifest["features"], expected_manifest["features"]):
        assert part.pop("sha256")
    assert manifest == expected_manifest
    with pytest.raises(ValueError, match=r"expected only the support set's images in .*, got '0003.png': delete"):
        generate(bundled, spy, tmp_path / "set", per_class=3)


def test_several_images_per_call_give_the_same_images(bundled: Any, stable: Any, tmp_path: Path) -> None:
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
def test_a_folder_of_images_with_another_recipe_is_refused(
    change: dict[str, Any], bundled: Any, stable: Any, tmp_path: Path
) -> None:
    generate(bundled, stable, tmp_path / "set")
    before, spy = contents(tmp_path / "set"), Spy(stable)
    prompts = change.pop("prompts", SAID)
    what = next(iter(change), "prompt")
    with pytest.raises(ValueError, match=f"expected .*0000.png to be made with {what} .* choose another folder"):
        support.generate(*bundled[:2], prompts, spy, tmp_path / "set", **{**FEW, **change})
    assert spy.calls == [] and contents(tmp_path / "set") == before


def test_images_of_another_pipeline_or_without_recipe_are_refused(bundled: Any, stable: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("text", ["[]", "5", '{"prompt": 1e400}', "[" * 10_000 + "]" * 10_000])
def test_a_recipe_or_a_note_that_is_no_recipe_is_told_from_one(text: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("clipkernels", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "0000.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"expected an image that was generated here, got .*0000.png"):
        diffusion._check_recipe(tmp_path / "0000.png", {"prompt": "a"})
    (tmp_path / "0001.flagged").write_text(text)
    assert diffusion._retries_used(tmp_path / "0001.png", {"prompt": "a"}) is None
    (tmp_path / "0001.flagged").write_text('{"prompt": "a", "retries": 2}')
    assert diffusion._retries_used(tmp_path / "0001.png", {"prompt": "a"}) == 2


def test_a_flagged_image_is_generated_again_from_other_noise(bundled: Any, stable: Any, tmp_path: Path) -> None:
    plain = Spy(stable)
    generate(bundled, plain, tmp_path / "plain")
    bad = plain.seeds[2]
    spy = Spy(stable, lambda seed: seed == bad)
    support_set = generate(bundled, spy, tmp_path / "set")
    assert len(spy.calls) == 9 and spy.calls[3]["prompt"] == ["an animal."] and spy.seeds[3] not in plain.seeds
    assert support_set.counts.tolist() == [4, 4]
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
    support_set = generate(bundled, spy, tmp_path / "set", retries=2, report=lines.append)
    assert lines == ["skipped image 1 of 'apple': flagged 3 times"]
    assert names(support_set)[1] == ["0000.png", "0002.png", "0003.png"] and len(spy.calls) == 10
    for retries in (1, 2):
        again = Spy(stable, lambda seed: seed in bad)
        generate(bundled, again, tmp_path / "set", retries=retries, report=lines.append)
        assert again.calls == [] and lines[1:] == retries * lines[:1]
    more = Spy(stable, lambda seed: seed in bad)
    assert generate(bundled, more, tmp_path / "set", retries=3).counts.tolist() == [4, 4]


def test_a_class_whose_images_are_all_flagged_is_named(bundled: Any, stable: Any, tmp_path: Path) -> None:
    apples = {diffusion._seed(0, "apple", index, attempt) for index in range(4) for attempt in range(2)}
    spy = Spy(stable, lambda seed: seed in apples)
    with pytest.raises(ValueError, match="expected an image that is not flagged for every class, got none for 'apple'"):
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


def test_the_same_images_can_be_encoded_for_another_tower(
    bundled: Any, stable: Any, tmp_path: Path, tiny: Any, encoded: list[int]
) -> None:
    generate(bundled, Spy(stable), tmp_path / "set")
    with torch.no_grad():
        tiny.visual.proj.mul_(-1)
    spy = Spy(stable)
    del encoded[:]
    support_set = support.generate(tiny, bundled[1], SAID, spy, tmp_path / "set", **FEW)
    assert spy.calls == [] and encoded == [8]
    torch.testing.assert_close(support_set.features, SupportSet.load(tmp_path / "set", tiny).features)
    with pytest.raises(ValueError, match="got another tower"):
        SupportSet.load(tmp_path / "set", bundled[0])


def test_a_pipeline_is_loaded_from_a_folder_of_safetensors(bundled: Any, stable: Any, tmp_path: Path) -> None:
    stable.save_pretrained(tmp_path / "pipeline")
    loaded = support.load_pipeline(tmp_path / "pipeline")
    assert diffusion._pipeline_hash(loaded) == diffusion._pipeline_hash(stable)
    generate(bundled, tmp_path / "pipeline", tmp_path / "set", per_class=1)
    generate(bundled, stable, tmp_path / "same", per_class=1)
    support_set = SupportSet.load(tmp_path / "set", bundled[0])
    assert support_set.about["settings"]["source"] == str(tmp_path / "pipeline")
    ours, same = (contents(tmp_path / name) for name in ("set", "same"))
    assert ours.pop("manifest.json") != same.pop("manifest.json")  # the manifest names the pipeline's folder
    assert ours == same


def test_a_pipeline_that_needs_unpickling_is_refused(stable: Any, tmp_path: Path) -> None:
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
        ({"per_class": 0}, "per_class must be an int of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an int of at least 1, got 1.5"),
        ({"images_per_call": 0}, "images_per_call must be an int of at least 1, got 0"),
        ({"retries": -1}, "retries must be an int of at least 0, got -1"),
    ],
)
def test_wrong_arguments_of_generate_are_one_line(
    bundled: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(bundled, None, tmp_path / "set", **options)


@pytest.mark.parametrize("size", [0, 60, -200])
def test_a_broken_image_is_named_for_deletion(size: int, bundled: Any, stable: Any, tmp_path: Path) -> None:
    generate(bundled, stable, tmp_path / "set")
    before = contents(tmp_path / "set")
    file = tmp_path / "set" / "zebra" / "0002.png"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"got '?.*0002.png'?.* delete (it|them) and run again"):
        generate(bundled, stable, tmp_path / "set", report=lambda line: None)
    file.unlink()
    generate(bundled, stable, tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_pipelines_without_components_differ_by_type() -> None:
    class Bare:
        pass

    class Other:
        pass

    assert diffusion._pipeline_hash(Bare()) == diffusion._pipeline_hash(Bare()) != diffusion._pipeline_hash(Other())
    assert diffusion._pipeline_hash(contents) != diffusion._pipeline_hash(generate)
