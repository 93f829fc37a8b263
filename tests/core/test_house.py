"""The layout and the language of the code: stems, directions of imports, public names, docstrings, names of tests."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import click
import pytest

import clipkernels as ck
import clipkernels.learn.distill
import clipkernels.learn.patch_ranking
import clipkernels.learn.recovery
import clipkernels.testing
from clipkernels import learn, questions
from clipkernels.cli import SHORT_HELPS, main

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipkernels"

# Files without an operation of their own, by folder.
HELPERS = {
    "ops": {"unchecked"},
    "reference": {"precision", "ranking"},
    "custom_ops": set(),
    "kernels": {"launch", "layer_norm", "rank", "ranking"},
}
# Imports go from a later row to an earlier one, or within a row.
LAYERS = (
    (
        "messages",
        "files",
        "folder_lock",
        "formats",
        "run_folder",
        "state_files",
        "layered_class",
        "cuda_graph",
        "freezing",
    ),
    ("reference", "backend"),
    ("arguments", "custom_ops"),
    ("plan", "plan_records"),
    ("ops",),
    ("row_places",),
    ("block",),
    ("adapters",),
    ("methods", "method_names", "fingerprint"),
    ("marks",),
    ("slot",),
    ("tower", "verify", "snapshot"),
    ("vlm",),
    ("patching", "encode", "graphs", "compilation"),
    ("data",),
    ("heads",),
    ("classifier",),
    ("support", "images"),
    ("runtime",),
    ("pictures",),
    ("learn",),
    ("measure", "testing"),
    ("artefacts",),
    ("exporting",),
    ("comparison",),
    ("collection",),
    ("tuning",),
    ("evaluation",),
    ("questions",),
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
        importer = layer_of("clipkernels." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
        for module in imports_of(file):
            other = layer_of(module) if module.startswith("clipkernels.") else None
            if importer is not None and other is not None and other > importer:
                upward.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not upward


def import_graph() -> dict[str, set[str]]:
    """The modules of the package and of the kernels, each with those that it imports anywhere in its file.

    The package itself is left out, because it imports lazily.
    """
    files = {f"clipkernels.kernels.{file.stem}": file for file in sources("kernels")}
    for file in sources("clipkernels"):
        parts = ("clipkernels", *file.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = file
    del files["clipkernels"]
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = (f"{node.module}.{part.name}" for part in node.names)
                graph[name].update(part if part in files else node.module for part in names)
            elif isinstance(node, ast.Import):
                graph[name].update(part.name for part in node.names)
    return {name: modules.intersection(files) - {name} for name, modules in graph.items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        list(TopologicalSorter(import_graph()).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = ("torch", "triton", "__future__", "clipkernels.kernels", "collections.abc", "math", "functools", "typing")
    wrong = [(file.name, module) for file in sources("kernels") for module in imports_of(file)]
    assert not [pair for pair in wrong if not pair[1].startswith(allowed)]


def test_benches_import_nothing_of_the_command_line() -> None:
    wrong = [(file, module) for file in sources("bench") for module in imports_of(file)]
    assert not [pair for pair in wrong if pair[1].startswith("clipkernels.cli")]


def test_the_public_names_are_those_that_are_meant() -> None:
    assert set(dir(ck)) == {*ck.__all__, "__version__"}
    assert all(getattr(ck, name) is not None for name in ck.__all__)


@pytest.mark.parametrize("folder", ["clipkernels", "kernels", "bench", "tests", "examples"])
def test_docstrings_do_not_begin_with_a_question_word(folder: str) -> None:
    texts = list(docstrings(folder))
    wrong = [f"{file.relative_to(ROOT)}: {text.splitlines()[0]}" for file, text in texts if OPENERS.match(text)]
    assert len(wrong) < 0.01 * len(texts), wrong


def undocumented(source: str, name: str) -> list[str]:
    """The class or function of a source, and its public methods, that have no docstring; dataclasses generate none."""
    (node,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    members = [
        (f"{name}.{member.name}", member)
        for member in (node.body if isinstance(node, ast.ClassDef) else [])
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
    ]
    return [path for path, definition in [(name, node), *members] if not ast.get_docstring(definition)]


PUBLIC = [ck, ck.ops, ck.support, ck.heads, ck.testing, learn.distill, learn.patch_ranking, learn.recovery, questions]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_functions_classes_and_methods_have_docstrings(module: Any) -> None:
    public = {name: getattr(module, name) for name in module.__all__}
    written = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert len(written) >= 5
    assert not [path for name, value in written.items() for path in undocumented(inspect.getsource(value), name)]


def test_a_generated_docstring_does_not_count() -> None:
    source = "@dataclass\nclass Config:\n    x: int\n\n    def plan(self):\n        return self.x\n"
    assert undocumented(source, "Config") == ["Config", "Config.plan"]


def test_every_verb_has_a_help_and_a_short_help() -> None:
    helps, short_helps = {}, dict(SHORT_HELPS)
    for name in main.list_commands(click.Context(main)):
        verb = main.get_command(click.Context(main), name)
        assert verb is not None
        helps[name] = verb.help or ""
        for part, command in verb.commands.items() if isinstance(verb, click.Group) else ():
            helps[f"{name} {part}"], short_helps[f"{name} {part}"] = command.help or "", command.get_short_help_str(55)
    assert helps.keys() == short_helps.keys()
    assert not [name for name, text in helps.items() if not text.strip() or OPENERS.match(text)]
    # A short help is whole at 80 columns; click ends one that it cuts off with three dots.
    assert not [name for name, text in short_helps.items() if not re.fullmatch(r".{10,54}[^.]\.", text)]


def test_names_of_tests_are_short_sentences() -> None:
    names = [
        node.name
        for file in sources("tests")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert names and not [name for name in names if len(name) > 70]
