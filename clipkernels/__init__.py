"""Fused kernels that choose, prune and merge the tokens of a CLIP ViT, patched into any CLIP tower with one call.

Public names are imported when they are first used, so that `import clipkernels` costs nothing by itself.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from clipkernels import backend, data, heads, learn, measure, ops, support, testing, vlm
    from clipkernels.adapters import UnsupportedTower
    from clipkernels.artefacts.load import load, load_method
    from clipkernels.artefacts.save import save
    from clipkernels.classifier import Classifier
    from clipkernels.collection.run import embed
    from clipkernels.collection.search import search
    from clipkernels.compilation import compilation_of, compile, uncompile
    from clipkernels.data import bundled
    from clipkernels.encode import Encoded, encode_image
    from clipkernels.exporting.export import export
    from clipkernels.graphs import graphed, ungraphed
    from clipkernels.heads import CALIP, TDA, MultiView, Reservoir, TipAdapter, TipX, ZeroShot
    from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, Schedule, Select, ToMe
    from clipkernels.patching import method_of, patch, patched, tower_of, unpatch
    from clipkernels.pictures.show import show
    from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Rank
    from clipkernels.tuning.tune import tune

__version__ = "0.1.0"
__all__ = [
    "CALIP",
    "Classifier",
    "Condense",
    "Dense",
    "EViT",
    "Encoded",
    "Merge",
    "Method",
    "MultiView",
    "PatchRanking",
    "Plan",
    "Predict",
    "Prune",
    "Rank",
    "Reservoir",
    "Schedule",
    "Select",
    "TCA",
    "TDA",
    "TipAdapter",
    "TipX",
    "ToMe",
    "UnsupportedTower",
    "ZeroShot",
    "backend",
    "bundled",
    "compilation_of",
    "compile",
    "data",
    "embed",
    "encode_image",
    "export",
    "graphed",
    "heads",
    "learn",
    "load",
    "load_method",
    "measure",
    "method_of",
    "ops",
    "patch",
    "patched",
    "save",
    "search",
    "show",
    "support",
    "testing",
    "tower_of",
    "tune",
    "uncompile",
    "ungraphed",
    "unpatch",
    "vlm",
]

_NAMES = {
    "adapters": ("UnsupportedTower",),
    "artefacts.load": ("load", "load_method"),
    "artefacts.save": ("save",),
    "classifier": ("Classifier",),
    "collection.run": ("embed",),
    "collection.search": ("search",),
    "compilation": ("compilation_of", "compile", "uncompile"),
    "data": ("bundled",),
    "encode": ("Encoded", "encode_image"),
    "exporting.export": ("export",),
    "graphs": ("graphed", "ungraphed"),
    "heads": ("CALIP", "TDA", "MultiView", "Reservoir", "TipAdapter", "TipX", "ZeroShot"),
    "methods": ("TCA", "Dense", "EViT", "Method", "PatchRanking", "Schedule", "Select", "ToMe"),
    "patching": ("method_of", "patch", "patched", "tower_of", "unpatch"),
    "pictures.show": ("show",),
    "plan": ("Condense", "Merge", "Plan", "Predict", "Prune", "Rank"),
    "tuning.tune": ("tune",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        value = getattr(_import_module(f"clipkernels.{_HOMES[name]}"), name)
    elif name in __all__:
        value = _import_module(f"clipkernels.{name}")
    else:
        raise AttributeError(f"module 'clipkernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


# In a checkout the kernels are next to the package, not in it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))
