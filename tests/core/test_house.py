"""The layout and the language of the code: stems, directions of imports, public names, docstrings, names of tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipkernels as ck

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipkernels"

# Files without an operation of their own, by folder.
HELPERS = {
    "ops": set(),
    "reference": {"precision", "ranking"},
    "custom_ops": set(),
    "kernels": {"layer_norm", "rank", "ranking"},
}
# Imports go from a later row to an earlier one, or within a row.
LAYERS = (
    ("plan", "files", "formats", "state_files"),
    ("reference", "backend"),
    ("arguments", "custom_ops"),
    ("ops",),
    ("block",),
    ("adapters",),
    ("methods", "fingerprint"),
    ("tower", "verify"),
    ("patching", "encode"),
    ("data",),
    ("heads",),
    ("classifier",),
    ("support", "images"),
    ("learn",),
    ("measure", "testing"),
    ("cli",),
)
OPENERS = re.compile(r"(What|Whether|Which|Where|How|Why|Who|Of)\b")


def sources(*folders: str) -> Iterator[Path]:
    """The Python files below folders of the repository."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports_of(file: Path) -> Iterator[str]:
    """The modules that a file imports, those for type checkers included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def docstrings(*folders: str) -> Iterator[tuple[Path, str]]:
    """The docstrings of modules, classes and functions below folders."""
    for file in sources(*folders):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield file, text


def layer_of(module: str) -> int | None:
    """The row of a module of the package; None for one outside of the rows."""
    part = module.removeprefix("clipkernels").lstrip(".").partition(".")[0]
    return next((row for row, names in enumerate(LAYERS) if part in names), None)


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="the tests are not in a checkout")
def test_an_operation_has_one_stem_in_every_folder() -> None:
    folders = {"ops": PACKAGE / "ops", "reference": PACKAGE / "reference"}
    folders |= {"custom_ops": PACKAGE / "custom_ops", "kernels": ROOT / "kernels"}
    stems = {name: {file.stem for file in path.glob("*.py")} - {"__init__"} for name, path in folders.items()}
    assert all(HELPERS[name] <= stems[name] for name in stems), "a helper that is named here is gone"
    operations = {name: files - HELPERS[name] for name, files in stems.items()}
    assert operations["reference"] == operations["custom_ops"] == operations["kernels"] == operations["ops"]


def test_every_file_of_the_package_has_a_layer() -> None:
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in sources("clipkernels")}
    assert parts - {"__init__", "__main__"} == {name for names in LAYERS for name in names}


def test_imports_go_one_way() -> None:
    upward = []
    for file in sources("clipkernels"):
        own = layer_of("clipkernels." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
        for module in imports_of(file):
            other = layer_of(module) if module.startswith("clipkernels.") else None
            if own is not None and other is not None and other > own:
                upward.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not upward


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = ("torch", "triton", "__future__", "clipkernels.kernels", "math", "functools", "typing")
    wrong = [(file.name, module) for file in sources("kernels") for module in imports_of(file)]
    assert not [pair for pair in wrong if not pair[1].startswith(allowed)]


def test_benches_import_nothing_of_the_command_line() -> None:
    wrong = [(file, module) for file in sources("bench") for module in imports_of(file)]
    assert not [pair for pair in wrong if pair[1].startswith("clipkernels.cli")]


def test_the_public_names_are_those_that_are_meant() -> None:
    assert set(dir(ck)) == {*ck.__all__, "__version__"}
    assert all(getattr(ck, name) is not None for name in ck.__all__)


@pytest.mark.parametrize("folder", ["clipkernels", "kernels", "bench", "tests"])
def test_docstrings_do_not_begin_with_a_question_word(folder: str) -> None:
    texts = list(docstrings(folder))
    wrong = [f"{file.relative_to(ROOT)}: {text.splitlines()[0]}" for file, text in texts if OPENERS.match(text)]
    assert len(wrong) < 0.01 * len(texts), wrong


def test_public_functions_and_classes_have_docstrings() -> None:
    public = [getattr(module, name) for module in (ck, ck.ops, ck.support) for name in module.__all__]
    assert not [value for value in public if callable(value) and not (getattr(value, "__doc__", None) or "").strip()]


def test_names_of_tests_are_short_sentences() -> None:
    names = [
        node.name
        for file in sources("tests")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert names and not [name for name in names if len(name) > 70]
