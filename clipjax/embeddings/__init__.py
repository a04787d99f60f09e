"""Embeddings of whole collections: beside a folder for search, in Parquet files, as a gallery."""

from clipjax.embeddings.folder import FolderIndex, Hit, Progress
from clipjax.embeddings.gallery import write_gallery
from clipjax.embeddings.parquet import Shards, Texts, write_shards

__all__ = ["FolderIndex", "Hit", "Progress", "Shards", "Texts", "write_gallery", "write_shards"]
