"""Embeddings of whole collections: kept for search, in Parquet files, as a gallery."""

from clipjax.embeddings.folder import CollectionIndex, FolderIndex, Hit, Progress
from clipjax.embeddings.gallery import write_gallery
from clipjax.embeddings.parquet import Shards, Texts, write_shards

__all__ = [
    "CollectionIndex",
    "FolderIndex",
    "Hit",
    "Progress",
    "Shards",
    "Texts",
    "write_gallery",
    "write_shards",
]
