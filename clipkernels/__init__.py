"""Fused kernels that choose, prune and merge the tokens of a CLIP ViT, patched into any CLIP tower with one call."""

from pathlib import Path as _Path

from clipkernels import backend, ops, support
from clipkernels.adapters import UnsupportedTower
from clipkernels.classifier import Classifier
from clipkernels.data import bundled
from clipkernels.encode import Encoded, encode_image
from clipkernels.heads import CALIP, Reservoir, TipAdapter, TipX, ZeroShot
from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, ToMe
from clipkernels.patch import method_of, patch, patched, tower_of, unpatch
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune

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
    "PatchRanking",
    "Plan",
    "Predict",
    "Prune",
    "Reservoir",
    "TCA",
    "TipAdapter",
    "TipX",
    "ToMe",
    "UnsupportedTower",
    "ZeroShot",
    "backend",
    "bundled",
    "encode_image",
    "method_of",
    "ops",
    "patch",
    "patched",
    "support",
    "tower_of",
    "unpatch",
]

# In a checkout the kernels lie beside the package, not in it.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))
