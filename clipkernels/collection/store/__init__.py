"""The store of a collection: plans, units and shards on disk, which no kill can harm."""

from clipkernels.collection.store.writer import Counts, Diff, Store

__all__ = ["Counts", "Diff", "Store"]
