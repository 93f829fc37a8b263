"""The contents of sdist and wheel; `clipkernels.kernels` is found after every kind of install.

Every import runs in a fresh interpreter that sees neither the working directory nor an installed clipkernels: `-I -S`
keeps both out, and the other libraries come from this process's path.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import clipkernels as ck

ROOT = Path(__file__).resolve().parents[2]
FIND_KERNELS = """
import importlib.util, json
import clipkernels
spec = importlib.util.find_spec("clipkernels.kernels.prune")
if importlib.util.find_spec("triton"):
    importlib.import_module("clipkernels.kernels.prune")
print(json.dumps([clipkernels.__file__, spec.origin]))
"""

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests are not in a checkout")


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """The output of code in a fresh interpreter that imports from `path`, .pth files included, then from this process's
    libraries."""
    libraries = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    added = [str(p) for p in path]
    setup = f"import site, sys\nsys.path = {added} + {libraries}\nfor p in {added}:\n    site.addsitedir(p)\n"
    command = [sys.executable, "-I", "-S", "-c", setup + code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources(folder: str, pattern: str = "*.py") -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def build(folder: Path, call: str, *arguments: object) -> Path:
    """The file that one call of setuptools' build backend writes; a copy is built, so that the checkout stays clean."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    copy, out = folder / "copy", folder / "out"
    if not copy.exists():
        ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results")
        shutil.copytree(ROOT, copy, ignore=ignored)
        out.mkdir()
    code = f"import setuptools.build_meta as backend\nprint(backend.{call}({str(out)!r}, *{arguments!r}))"
    return out / python(code, copy, cwd=copy).split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sdist"), "build_sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the unpacked sdist, as pip builds it where an index has no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder / sdist.name.removesuffix(".tar.gz")).rename(folder / "copy")
    (folder / "out").mkdir()
    return build(folder, "build_wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_sdist_holds_kernels_tests_benchmarks_and_guides(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = sources("kernels")
    assert kernels
    guides = sources("docs", "*.md") | sources("examples") | {"docs/kept.png", "docs/speedup.png"}
    assert kernels | sources("tests") | sources("bench") | guides | {"Makefile", "LICENSE", "CHANGELOG.md"} <= names


def test_the_wheel_holds_every_module_of_the_checkout_and_the_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    data = {name for name in sources("clipkernels/data", "*.*") if not name.endswith((".py", ".pyc"))}
    assert "clipkernels/data/digits.npz" in data
    modules = {name.replace("kernels/", "clipkernels/kernels/", 1) for name in sources("kernels")}
    assert names == modules | sources("clipkernels") | data | {"clipkernels/py.typed"}


def test_an_installed_wheel_finds_its_kernels_and_data(installed: Path, tmp_path: Path) -> None:
    code = FIND_KERNELS + "from clipkernels.data import digits\nprint(len(digits.load(True).labels))"
    paths, rows = python(code, installed, cwd=tmp_path).splitlines()
    assert json.loads(paths) == [
        str(installed / "clipkernels" / "__init__.py"),
        str(installed / "clipkernels" / "kernels" / "prune.py"),
    ]
    assert rows == "899"


def test_the_installed_command_prints_its_help(installed: Path, tmp_path: Path) -> None:
    code = """
from importlib.metadata import distributions
(script,) = next(iter(distributions(name="clipkernels", path=sys.path[:1]))).entry_points.select(name="clipkernels")
sys.argv = ["clipkernels", "--help"]
script.load()()
"""
    assert "demo" in python(code, installed, cwd=tmp_path)


def test_the_distribution_and_the_package_agree_on_the_version(installed: Path) -> None:
    (distribution,) = distributions(name="clipkernels", path=[str(installed)])
    assert distribution.version == ck.__version__


@pytest.mark.parametrize("mode", ["lenient", pytest.param("strict", marks=pytest.mark.slow)])
def test_an_editable_install_finds_the_kernels_of_its_checkout(mode: str, tmp_path: Path) -> None:
    archive = build(tmp_path, "build_editable", {"editable_mode": mode})
    site = tmp_path / "site"
    with zipfile.ZipFile(archive) as file:
        file.extractall(site)
    package, prune = (Path(p).resolve() for p in json.loads(python(FIND_KERNELS, site, cwd=tmp_path)))
    assert package.is_relative_to(tmp_path / "copy")
    assert prune.is_relative_to(tmp_path / "copy")


def test_a_checkout_needs_no_install_to_find_its_kernels(tmp_path: Path) -> None:
    package, prune = json.loads(python(FIND_KERNELS, ROOT, cwd=tmp_path))
    assert package == str(ROOT / "clipkernels" / "__init__.py")
    assert prune == str(ROOT / "kernels" / "prune.py")


def test_without_triton_everything_runs_on_the_reference() -> None:
    code = """
sys.modules["triton"] = None
import torch
import clipkernels as ck
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import flat, check_against_fp64
from clipkernels.testing.inputs import Shape, InputFactory
torch.set_num_threads(1)
source = InputFactory(Shape(21, 128, 2, 1, 4), 2, torch.float32, torch.device("cpu"))
for name, case in CASES.items():
    inputs = case.inputs(source)
    verdict = check_against_fp64(case, source, inputs, flat(case.call(source, "auto", *inputs)), "reference")
    assert verdict.fault is None, (name, verdict)
    try:
        case.call(source, "triton", *inputs)
    except RuntimeError as error:
        assert "triton is not installed: pip install triton" in str(error), error
    else:
        raise AssertionError(name + " ran on triton")
model, preprocess, tokenizer = ck.bundled()
images = torch.randn(2, 3, 32, 32)
dense = model.encode_image(images)
for method in (ck.Dense(), ck.EViT(0.5), ck.ToMe(8)):
    with ck.patched(model, method):
        model.encode_image(images).square().sum().backward()
assert torch.equal(model.encode_image(images), dense)
x = torch.arange(10.0).view(1, 5, 2)
pruned = ck.ops.prune_tokens(x, torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
print(pruned.index.tolist(), pruned.tokens.tolist())
"""
    assert python(code, ROOT).strip() == "[[1, 3]] [[[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]]"


def test_another_package_called_kernels_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    code = FIND_KERNELS + "import kernels\nprint(kernels.OWNER)"
    paths, owner = python(code, ROOT, tmp_path).splitlines()
    assert owner == "somebody else"
    assert json.loads(paths)[1] == str(ROOT / "kernels" / "prune.py")


def test_transformers_imports_beside_hugging_faces_kernels() -> None:
    for name in ("transformers", "kernels"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            pytest.skip(f"{name} is not installed")
    python("import clipkernels\nfrom transformers import CLIPVisionModel", ROOT)
