"""The files of an exported folder for people and for pip, their sizes, and the versions that wrote them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from clipkernels.exporting.graphs import graphs_of
from clipkernels.measure.environment import versions
from clipkernels.runtime.cleaning import REPAIRING

RUNTIMES = ("nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "torchao")

GUIDE = """\
{model} of {library}{method}, in {precision} for {runtime}, exported by clipkernels.
With Python 3.10 or newer, `pip install -r requirements.txt`, then `python runtime photo.jpg`; or `from runtime import
Runtime` beside this file.
"""


def write_guide(folder: Path, name: dict[str, Any], method: str | None, runtime: str, precision: str) -> None:
    """Write README.md: the content of the folder and how to run it."""
    titles = {"onnx": "onnxruntime", "openvino": "OpenVINO", "pt2": "torch"}
    model = name["config"] if isinstance(name["config"], str) else name["model"]
    text = GUIDE.format(
        model=model, library=name["library"], method=f" with {method}" if method else "",
        precision=precision, runtime=titles[runtime],
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_requirements(folder: Path, runtime: str, tokenizer: dict[str, Any] | None) -> None:
    """Write requirements.txt: the packages that the runtime needs."""
    packages = ["numpy", "pillow", *graphs_of(runtime).REQUIREMENTS]
    if tokenizer is not None:
        packages.append("tokenizers")
        packages += ["ftfy"] if tokenizer["clean"] in REPAIRING else []
    (folder / "requirements.txt").write_text("\n".join(sorted(packages)) + "\n", encoding="utf-8")


def sizes_in(folder: Path) -> dict[str, int]:
    """The bytes of the files of a folder; those of the runtime's copy are one sum."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            name = "runtime/" if name.startswith("runtime/") else name
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def installed_versions() -> dict[str, str | None]:
    """The versions of clipkernels, Python, torch and the packages that write graphs; None for one that is absent."""
    result: dict[str, str | None] = {name: version and str(version) for name, version in versions().items()}
    for name in RUNTIMES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result
