"""Accuracy of dense and reduced towers on labelled data sets, by method, head and shots, beside published figures.

data = evaluation.read_dataset("pets", "/data/oxford_pets")     # CoOp's layout; any other name is a plain folder
test = data.splits["test"]                                      # names, labels, and read(name) -> PIL image
captions = evaluation.read_captions("/data/coco/annotations/captions_val2017.json")
evaluation.lookup("pets", "ViT-B-16 openai", "evit:0.9", "zero-shot")
"""

from clipkernels.evaluation.captions import Captions, read_captions
from clipkernels.evaluation.datasets import DATASETS, SPLITS, Dataset, Items, read_dataset
from clipkernels.evaluation.published import MEANS, Figure, lookup, published_figures

__all__ = [
    "Captions",
    "DATASETS",
    "Dataset",
    "Figure",
    "Items",
    "MEANS",
    "SPLITS",
    "lookup",
    "published_figures",
    "read_captions",
    "read_dataset",
]
