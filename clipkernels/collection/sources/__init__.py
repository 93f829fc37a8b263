"""The sources of a collection: folders, globs, lists, Parquet, tars and datasets, listed in one table."""

from clipkernels.collection.sources.items import Answers, Item, Source
from clipkernels.collection.sources.listing import Listing, find_sources, list_items

__all__ = ["Answers", "Item", "Listing", "Source", "find_sources", "list_items"]
