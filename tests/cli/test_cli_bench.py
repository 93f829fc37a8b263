"""`clipkernels bench`: numbers, formats, the three libraries, and warnings."""

from __future__ import annotations

import csv
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import clipkernels as ck
from clipkernels.cli.bench import read
from clipkernels.cli.parts.methods import default_methods
from clipkernels.data import scenes
from clipkernels.images import draw_images
from clipkernels.measure.fidelity import compare, nearest
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import gmacs_for, plan_for
from tests.cli.commands import error_after_warnings as error
from tests.cli.commands import run

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--rounds", 2, "--batch-size", 4)
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


def bench(*arguments: object) -> Result:
    return run("bench", *QUICK, *arguments)


def rows(*arguments: object) -> list[dict[str, Any]]:
    result = bench("--format", "json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes as files."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(scenes.draw(10, seed=5)[0]):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def both(pictures: Path) -> Result:
    """The bundled model on the scenes in fp32 and bf16, as JSON."""
    methods = ("--methods", "evit:0.5,tome:8", "--precision", "fp32", "--precision", "bf16")
    result = bench(pictures, "--format", "json", *methods)
    assert result.exit_code == 0, result.output
    return result


def embeddings(folder: Path, method: ck.Method | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the bundled model's own embeddings (n,E) of the files of a folder, in fp64."""
    model, preprocess, _ = ck.bundled()
    model.to(dtype)
    if method is not None:
        ck.patch(model, method)
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(folder.iterdir())])
    with torch.inference_mode():
        return model.encode_image(images.to(dtype)).double()


def test_a_row_per_precision_and_method_has_its_cost(both: Result) -> None:
    table = json.loads(both.stdout)["rows"]
    methods = {"dense (host)": None, "Dense()": ck.Dense(), "EViT(keep=0.5)": ck.EViT(0.5), "ToMe(r=8)": ck.ToMe(8)}
    assert [(row["precision"], row["variant"]) for row in table] == [(p, m) for p in ("fp32", "bf16") for m in methods]
    tower = ck.tower_of(ck.bundled()[0])
    for row in table:
        plan = plan_for(tower, methods[row["variant"]] or ck.Dense())
        assert row["tokens"] == list(plan.tokens)
        assert row["gmacs"] == pytest.approx(gmacs_for(tower, plan), abs=1e-5)
        assert (row["model"], row["weights"], row["mode"], row["images"]) == ("bundled", "bundled", "eager", 10)


def test_speed_ups_are_against_the_fastest_dense_row(both: Result) -> None:
    table = json.loads(both.stdout)["rows"]
    for precision in ("fp32", "bf16"):
        group = {row["variant"]: row for row in table if row["precision"] == precision}
        baseline = group[group["Dense()"]["baseline"]]
        assert baseline["speedup"] == baseline["efficiency"] == 1.0
        assert baseline["milliseconds"] == min(group[name]["milliseconds"] for name in ("dense (host)", "Dense()"))
        for row in group.values():
            assert row["baseline"] == baseline["variant"]
            assert row["efficiency"] == pytest.approx(
                row["speedup"] * row["gmacs_run"] / baseline["gmacs_run"], rel=2e-2
            )
            rate = 4e3 / baseline["milliseconds"] * row["speedup"]
            assert row["images_per_second"] == pytest.approx(rate, rel=1e-3)
            assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]


def test_cosines_are_with_the_dense_fp32_embeddings(both: Result, pictures: Path) -> None:
    table = {(row["precision"], row["variant"]): row for row in json.loads(both.stdout)["rows"]}
    dense, pruned = embeddings(pictures, None), embeddings(pictures, ck.EViT(0.5))
    row = table["fp32", "EViT(keep=0.5)"]
    cosines = torch.cosine_similarity(pruned, dense)
    expected = [cosines.min().item(), cosines.mean().item()]
    assert [row["cosine_min"], row["cosine_mean"]] == pytest.approx(expected, abs=1e-3)
    low = torch.cosine_similarity(embeddings(pictures, ck.EViT(0.5), torch.bfloat16), pruned)
    row = table["bf16", "EViT(keep=0.5)"]
    assert row["precision_cosine_mean"] == pytest.approx(low.mean().item(), abs=2e-2)
    assert row["precision_cosine_min"] <= row["precision_cosine_mean"]


def test_tca_is_among_the_methods(pictures: Path) -> None:
    table = {row["variant"]: row for row in rows(pictures, "--methods", "tca:0.1")}
    assert list(table) == ["dense (host)", "Dense()", "TCA(rate=0.1)"]
    assert table["TCA(rate=0.1)"]["tokens"] == list(ck.TCA(0.1).plan(65, 6).tokens)


def test_the_host_in_fp32_agrees_with_itself(both: Result) -> None:
    host, dense = json.loads(both.stdout)["rows"][:2]
    assert host["cosine_min"] == host["cosine_mean"] == host["agreement"] == 1.0
    assert dense["cosine_min"] == pytest.approx(1, abs=1e-5)
    assert host["precision_cosine_min"] is None


def test_agreement_is_the_share_of_equal_nearest_neighbours(both: Result, pictures: Path) -> None:
    row = json.loads(both.stdout)["rows"][2]
    same = nearest(embeddings(pictures, None)) == nearest(embeddings(pictures, ck.EViT(0.5)))
    assert row["agreement"] == pytest.approx(same.double().mean().item(), abs=0.11)  # one near tie among ten


def test_of_equally_near_rows_the_lower_index_is_nearest() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [9.0, 0.0], [0.0, 2.0]]).double()
    assert nearest(x).tolist() == [3, 0, 4, 0, 2]
    many = torch.randn(1500, 3, generator=torch.Generator().manual_seed(0)).double()
    near = torch.nn.functional.normalize(many, dim=1)
    assert torch.equal(nearest(many), (near @ near.T).fill_diagonal_(-2).argmax(1))


def test_an_embedding_that_is_not_finite_counts_as_cosine_zero() -> None:
    dense = torch.eye(3).double()
    actual = dense.clone()
    actual[1, 1] = torch.inf
    fidelity = compare(actual, dense, dense)
    assert fidelity.cosine == fidelity.precision == (0.0, pytest.approx(2 / 3))
    assert not fidelity.finite
    assert compare(dense[:1], dense[:1], None).agreement is None


def test_the_peak_holds_a_temporary_of_known_size() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(2**20)  # 4 MiB
        second = first + 1  # and 4 more
        del first
        return second[:2] + torch.empty(2**19).sum()  # 2 MiB in place of the first four

    assert peak(run, torch.device("cpu")) == pytest.approx(8 * 2**20, abs=1000)


def test_the_peak_of_a_compiled_call_is_measured() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).relu() @ x

    x = torch.randn(512, 512)  # 1 MiB: both products are held while the second is made
    compiled = torch.compile(run, backend="aot_eager")
    compiled(x)
    assert peak(partial(compiled, x), torch.device("cpu")) >= 2 * 2**20
    assert peak(partial(run, x), torch.device("meta")) is None


def test_a_forward_holds_more_than_its_embeddings_and_less_in_bf16(both: Result) -> None:
    table = json.loads(both.stdout)["rows"]
    fp32, bf16 = ([row["peak_mib"] for row in table if row["precision"] == name] for name in ("fp32", "bf16"))
    hidden = 4 * 65 * 512 * 4 / 2**20  # B·N·4C floats in an MLP
    assert min(fp32) > hidden
    assert max(low / high for low, high in zip(bf16, fp32, strict=True)) < 0.75


def test_csv_and_table_agree_with_json(pictures: Path) -> None:
    common = (pictures, "--methods", "evit:0.5")
    records = list(csv.DictReader(io.StringIO(bench(*common, "--format", "csv").stdout)))
    assert [row["variant"] for row in records] == ["dense (host)", "Dense()", "EViT(keep=0.5)"]
    assert records[2]["tokens"] == "65 65 34 34 19 11 11"
    assert records[2]["precision_cosine_min"] == ""
    assert set(records[0]) == set(rows(*common)[0])
    table = bench(*common)
    assert all(name in table.stdout for name in ("dense (host)", "EViT(keep=0.5)", "65→34→19→11", "×2.03", "η = "))
    assert table.stderr == ""


def test_json_records_the_settings() -> None:
    result = json.loads(bench("--methods", "evit:0.5", "--format", "json", "--clock", "process", "--threads", 1).stdout)
    assert (result["rounds"], result["clock"], result["environment"]["threads"]) == (2, "process", 1)
    assert any("random noise" in note for note in result["notes"])


def test_the_run_ends_with_what_it_takes_and_why(pictures: Path) -> None:
    document = json.loads(bench(pictures, "--methods", "tome:8", "--precision", "fp32", "--precision", "bf16",
                                "--format", "json").stdout)  # fmt: skip
    assert [choice["precision"] for choice in document["choices"]] == ["fp32", "bf16"]
    for choice in document["choices"]:  # ten images show nothing
        assert choice["method"] in ("dense (host)", "Dense()") and choice["min_agreement"] == 0.9
        assert choice["reason"].startswith(f"{choice['precision']}: take {choice['method']}: ")
    table = bench(pictures, "--methods", "tome:8").stdout.splitlines()
    assert table[-1].startswith("fp32: take ")
    rows = bench(pictures, "--methods", "tome:8", "--format", "csv")
    assert "take" not in rows.stdout and rows.stderr.splitlines()[-1].startswith("fp32: take ")
    for images, reason in (
        (["--limit", 4], "the images are random noise"),
        ([min(pictures.iterdir())], "a single ima"),
    ):
        line = bench(*images, "--methods", "evit:0.1", "--batch-size", 1).stdout.splitlines()[-1]
        assert reason in line or "no method is faster in nine rounds of ten" in line
    assert "'--min-agreement': 1.0 is not in the range" in bench(pictures, "--min-agreement", 1).stderr


def test_results_and_a_plot_go_to_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = bench("--methods", "tome:8", "--output", tmp_path / "out.txt", "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "ToMe(r=8)" in (tmp_path / "out.txt").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert len(list(tmp_path.iterdir())) == 2


def test_a_plot_without_matplotlib_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert "pip install matplotlib" in error(bench("--plot", "x.png"))


def test_single_methods_and_lists_make_one_table() -> None:
    options = ("--method", "tome:2:inflect=-1", "--methods", "evit:0.5,none,dense", "--method", "evit")
    names = [row["variant"] for row in rows(*options)]
    assert names == ["dense (host)", "Dense()", "EViT(keep=0.5)", "ToMe(r=2, inflect=-1)", "EViT(keep=0.7)"]


def test_without_methods_they_are_those_of_the_demo() -> None:
    assert [row["variant"] for row in rows()] == list(default_methods(ck.tower_of(ck.bundled()[0])))


def test_random_images_are_reported_as_random() -> None:
    result = bench("--methods", "tome:8", "--limit", 5)
    assert "warning: no IMAGES given: using 5 random-noise images; cosines mean little\n" in result.stderr
    assert "The images are random noise" in result.stdout
    assert "5 random images" in result.stdout


@pytest.mark.parametrize("seed", [0, 3])
def test_a_limit_draws_files_by_the_seed(seed: int, tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.png").write_text("no image")
    drawn = draw_images(sorted(map(str, tmp_path.iterdir())), 4, seed)
    Image.new("RGB", (32, 32)).save(drawn[1])
    result = bench(tmp_path, "--limit", 4, "--seed", seed, "--methods", "tome:8", "--format", "json")
    assert result.exit_code == 1
    skipped = [line.partition(": ")[0] for line in result.stderr.splitlines()]
    assert skipped == [f"skipped {path}" for path in (drawn[0], *drawn[2:])]
    assert json.loads(result.stdout)["rows"][0]["images"] == 1


def test_images_are_read_upright_and_other_files_counted(tmp_path: Path) -> None:
    gradient = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 3
    gradient.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "0.png", exif=exif)
    (tmp_path / "notes.txt").touch()
    tower, preprocess = ck.tower_of(ck.bundled()[0]), ck.bundled()[1]
    for turn, expected in ((True, gradient), (False, gradient.transpose(Image.Transpose.ROTATE_180))):
        images, failures = read([str(tmp_path / "0.png")], preprocess, tower, exif=turn)
        assert torch.equal(images[0], preprocess(expected)) and failures == 0
    result = bench(tmp_path, "--methods", "tome:8")
    assert (result.exit_code, result.stderr) == (0, "skipped 1 .txt: not images\n")


def test_a_single_image_has_no_neighbour_to_agree_on(pictures: Path) -> None:
    table = rows(pictures / "0.png", "--methods", "tome:8")
    assert [row["agreement"] for row in table] == [None] * 3
    assert table[0]["cosine_min"] == 1.0
    assert "tome" not in bench(pictures / "0.png", "--methods", "tome:8").stdout


def test_every_mode_compiles_every_variant(monkeypatch: pytest.MonkeyPatch, registered: str, pictures: Path) -> None:
    counters = {mode: CompileCounter() for mode in ("default", "reduce-overhead", "max-autotune")}

    def fake(function: Any, mode: str, **options: Any) -> Any:
        return compiler(function, backend=counters[mode], **options)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", fake)
    options = [option for mode in ("none", *counters) for option in ("--compile", mode)]
    table = rows("--model", registered, pictures, "--methods", "evit:0.5", *options)
    # Nine in all: more than torch's limit for code that they share.
    assert [counter.frame_count for counter in counters.values()] == [3, 3, 3]
    assert [row["mode"] for row in table[::3]] == ["eager", *(f"compiled {mode}" for mode in counters)]
    for eager, compiled in zip(table[:3], table[3:6], strict=True):
        assert compiled["variant"] == eager["variant"]
        assert compiled["cosine_mean"] == pytest.approx(eager["cosine_mean"], abs=1e-2)
        assert compiled["peak_mib"] > 0.01
    dense = [row for row in table if row["variant"] in ("dense (host)", "Dense()")]
    assert min(dense, key=lambda row: row["milliseconds"])["speedup"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), [("default", "compiled default"), ("freeze", "frozen")])
def test_inductor_compiles_a_tower(pictures: Path, mode: str, name: str) -> None:
    table = rows(pictures, "--methods", "evit:0.5", "--compile", mode)
    eager, compiled = table[2], table[5]
    assert compiled["mode"] == name
    assert compiled["cosine_mean"] == pytest.approx(eager["cosine_mean"], abs=1e-2)
    assert 0.1 < compiled["peak_mib"] < eager["peak_mib"]


@pytest.mark.parametrize(("runtime", "package"), [("onnxruntime", "onnxscript"), ("openvino", "openvino")])
def test_a_tower_runs_in_other_runtimes(pictures: Path, registered: str, runtime: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    table = rows("--model", registered, pictures, "--methods", "evit:0.5", "--compile", runtime)
    assert [row["mode"] for row in table] == ["eager"] * 3 + [runtime] * 3
    for eager, exported in zip(table[:3], table[3:], strict=True):
        assert exported["variant"] == eager["variant"]
        assert exported["cosine_min"] == pytest.approx(eager["cosine_min"], abs=1e-5)
        assert exported["gmacs_run"] == eager["gmacs_run"]
        assert exported["peak_mib"] is None
        assert exported["milliseconds"] > 0


def test_openvino_runs_in_bf16(pictures: Path, registered: str) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    options = ["--methods", "evit:0.5", "--compile", "openvino", "--precision", "bf16"]
    table = rows("--model", registered, pictures, *options)
    assert [row["mode"] for row in table] == ["eager"] * 3 + ["openvino"] * 3
    assert min(row["cosine_min"] for row in table[3:5]) > 0.999


@pytest.mark.parametrize(
    ("runtime", "precision", "message"),
    [
        ("onnxruntime", "bf16", "expected fp32 for onnxruntime on a CPU, got bf16"),
        ("openvino", "fp16", "expected fp32 or bf16 for openvino on a CPU, got fp16"),
    ],
)
def test_a_runtime_without_the_precision_is_one_line(runtime: str, precision: str, message: str) -> None:
    assert message in error(bench("--compile", runtime, "--precision", precision))


def test_a_runtime_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "openvino" in error(bench("--compile", "openvino"))


def test_a_variant_that_does_not_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(function: Any, **options: Any) -> Any:
        def fail(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nanywhere")

        return fail

    monkeypatch.setattr(torch, "compile", fake)
    line = error(bench("--compile", "default"), status=1)
    assert "expected dense (host), compiled default, fp32 to run on cpu, got: no compiler anywhere" in line


def test_a_tower_that_bf16_ruins_is_warned_about(registered: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = open_clip.create_model(registered).state_dict()
    # Added to all alike, it leaves a LayerNorm's result alone, and bf16 no bits for what differs.
    weights["visual.positional_embedding"] += 1000
    save_file(weights, tmp_path / "poor.safetensors")
    common = ("--model", registered, "--pretrained", tmp_path / "poor.safetensors", "--methods", "evit:0.7")
    result = bench(*common, "--precision", "bf16", "--format", "json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)["rows"]
    poor = [row for row in table if row["precision_cosine_min"] < 0.99]
    assert len(poor) == len(table) == 3
    for row in poor:
        assert f"warning: {registered}, {row['variant']}, bf16: expected a cosine of at least 0.99" in result.stderr
    assert f"got a minimum of {poor[0]['precision_cosine_min']:.4f}" in result.stderr


def test_embeddings_that_overflow_are_warned_about(registered: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = open_clip.create_model(registered).state_dict()
    weights["visual.proj"] *= 1e6
    save_file(weights, tmp_path / "large.safetensors")
    common = ("--model", registered, "--pretrained", tmp_path / "large.safetensors", "--methods", "evit:0.7")
    result = bench(*common, "--precision", "fp16", "--format", "json")
    assert "Dense(), fp16: expected finite embeddings, got inf or nan" in result.stderr
    assert json.loads(result.stdout)["rows"][0]["cosine_min"] == 0.0


def test_a_tower_that_bf16_suits_is_not_warned_about(registered: str) -> None:
    result = bench("--model", registered, "--precision", "bf16", "--methods", "evit:1", "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["precision_cosine_min"] > 0.99
    assert "expected a cosine" not in result.stderr


def test_an_open_clip_model_with_random_weights_says_so(registered: str) -> None:
    result = bench("--model", registered, "--methods", "evit:0.7")
    assert f"warning: {registered} has random weights" in result.stderr
    assert f"open_clip: {registered}, random weights" in result.stdout
    assert "The weights are random" in result.stdout


def test_a_timm_model_runs_with_random_and_stored_weights(pictures: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    common = ("--library", "timm", "--model", "test_vit", pictures, "--methods", "evit:0.5")
    result = bench(*common)
    assert result.exit_code == 0, result.output
    assert "warning: test_vit has random weights" in result.stderr
    table = rows(*common, "--pretrained", tmp_path / "vit.safetensors")
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([preprocess(Image.open(path)) for path in sorted(pictures.iterdir())])
    with torch.inference_mode():
        dense = model(images)
    ck.patch(model, ck.EViT(0.5))
    with torch.inference_mode():
        pruned = model(images)
    assert table[2]["cosine_mean"] == pytest.approx(torch.cosine_similarity(dense, pruned).mean().item(), abs=1e-3)
    assert (table[2]["library"], table[2]["tokens"][0]) == ("timm", 101)


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_timm_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    torch.save({"state_dict": Trap(str(tmp_path / "sprung"))}, tmp_path / "bad.pth")
    result = bench("--library", "timm", "--model", "test_vit", "--pretrained", tmp_path / "bad.pth")
    assert "expected a model that loads, got test_vit" in error(result, status=1)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("family", ["CLIPModel", "SiglipVisionModel"])
def test_a_transformers_folder_runs_with_both_weights(family: str, pictures: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from clipkernels.testing import randomized, transformers_tower

    model = randomized(transformers_tower(family, layers=4, **VISION))
    model.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32}
    mean = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.05, 0.06, 0.07]}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, **mean)
    processor.save_pretrained(tmp_path / "model")
    common = ("--library", "transformers", "--model", tmp_path / "model", pictures, "--methods", "evit:0.3")
    result = bench(*common)
    assert result.exit_code == 0, result.output
    assert "has random weights without --pretrained" in result.stderr
    assert "no image processor" not in result.stderr
    table = rows(*common, "--pretrained", "local")
    images = [Image.open(path).convert("RGB") for path in sorted(pictures.iterdir())]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    tower = ck.tower_of(model)
    with torch.inference_mode():
        dense = tower.encode(pixels)
    ck.patch(model, ck.EViT(0.3))
    with torch.inference_mode():
        cosines = torch.cosine_similarity(dense, tower.encode(pixels))
    assert table[2]["cosine_mean"] == pytest.approx(cosines.mean().item(), abs=1e-3)
    assert table[2]["cosine_min"] == pytest.approx(cosines.min().item(), abs=1e-3)
    assert table[2]["cosine_mean"] < 0.999


def test_a_folder_without_an_image_processor_is_warned_about(tmp_path: Path, pictures: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from clipkernels.testing import transformers_tower

    transformers_tower("CLIPVisionModel", **VISION).save_pretrained(tmp_path / "bare")
    common = ("--library", "transformers", "--model", tmp_path / "bare", pictures, "--methods", "tome:2")
    result = bench(*common)
    assert result.exit_code == 0, result.output
    assert "has no image processor for (32, 32): resize and crop instead" in result.stderr


def test_missing_weights_of_a_folder_are_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from clipkernels.testing import transformers_tower

    transformers_tower("CLIPVisionModel", **VISION).save_pretrained(tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    remaining = {name: tensor for name, tensor in load_file(weights).items() if "post_layernorm" not in name}
    save_file(remaining, weights, metadata={"format": "pt"})
    common = ("--library", "transformers", "--model", tmp_path / "part", "--methods", "tome:2")
    result = bench(*common, "--pretrained", "local")
    assert "has random weights in 2 places" in result.stderr


def test_an_unsupported_tower_is_one_line(resnet: str) -> None:
    assert "got ModifiedResNet" in error(bench("--model", resnet))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--methods", "evit:0.5,prune:3"],
            "patch-ranking:0.6, schedule.json, dense or none, got 'prune:3': no such method",
        ),
        (["--methods", "evit:x"], "such as evit:0.7:blocks=3/6/9, got 'evit:x': keep: expected a number, got 'x'"),
        (["--method", "evit:0.7:blocks=9"], "got 'evit:0.7:blocks=9': blocks must be ints in [0, 5]"),
        (["--methods", "evit:2"], "got 'evit:2': keep must be a number in (0, 1], got 2.0"),
        (["--methods", "tome:-1"], "got 'tome:-1': r must be an int of at least 0, got -1"),
        (["--methods", ""], "got '': no such method"),
        (["--library", "flax"], "'flax' is not one of"),
        (["--library", "timm"], "expected --model with --library timm, got no --model"),
        (["--pretrained", "openai"], "expected --model with --pretrained openai, got no --model"),
        (["--model", "ViT-B-61"], "expected one of open_clip's models (ViT-B-16"),
        (["--model", "ViT-B-16", "--pretrained", "nobody"], "or one of ViT-B-16's tags (openai"),
        (["--library", "timm", "--model", "test_vat"], "expected one of timm's models (test_vit"),
        (["--library", "timm", "--model", "test_vit.x"], "expected one of test_vit's tags (r160_in1k), got 'x'"),
        (
            ["--library", "timm", "--model", "test_vit", "--pretrained", "x"],
            "a checkpoint file or one of test_vit's tags",
        ),
        (["--library", "timm", "--model", "test_convnext"], "got timm's ConvNeXt"),
        (["--library", "transformers", "--model", ".", "--pretrained", "main"], "expected --pretrained local"),
        (["--method", "evit", "--methods", "tome:8", "--methods", "tca"], "expected one --methods, got tome:8 and tca"),
        (["nowhere"], "got 'nowhere', which matches nothing"),
        (["--device", "abacus"], "expected a device of this machine, got 'abacus'"),
        (["--clock", "process", "--threads", "2"], "expected --threads 1 with --clock process, got 2"),
        (["--output", "nowhere/out.csv"], "expected a file that can be written for --output"),
        (["--plot", "out.gif"], "expected a file ending in .png, .svg, .pdf for --plot, got out.gif"),
        (["--plot", "nowhere/out.png"], "expected a file that can be written for --plot"),
        (["--rounds", "0"], "--rounds"),
        (["--what"], "No such option"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, monkeypatch: Any, tmp_path: Path) -> None:
    if "timm" in options:
        pytest.importorskip("timm", reason="timm is not installed")
    if "transformers" in options:
        pytest.importorskip("transformers", reason="transformers is not installed")
    if "--plot" in options and "nowhere/out.png" in options:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    assert message in error(bench(*options))
    assert torch.get_num_threads() == 1


def test_a_folder_without_a_model_is_a_failure(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    result = bench("--library", "transformers", "--model", tmp_path)
    assert f"error: expected a model that loads, got {tmp_path}: " in error(result, status=1)


def test_a_library_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = bench("--library", "transformers", "--model", "somebody/clip")
    assert "expected transformers to be installed (pip install transformers)" in error(result)


def test_files_without_an_image_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    result = bench(tmp_path)
    assert result.exit_code == 2
    assert "expected images, got 1 file that cannot be used, such as" in result.stderr.splitlines()[-1]
