"""Classification data on disk: plain folders, the papers' sets in CoOp's layout, ImageNet and its variants, CIFAR,
point clouds."""

from clipkernels.evaluation.datasets.dataset import SPLITS, Dataset, Items
from clipkernels.evaluation.datasets.table import DATASETS, read_dataset

__all__ = ["DATASETS", "Dataset", "Items", "SPLITS", "read_dataset"]
