"""Data: sources, decoding, augmentation, tokenizers and the loader."""

from clipjax.data.augment import (
    Augmentation,
    CaptionChoice,
    ColorJitter,
    Flip,
    RandomResizedCrop,
    Resize,
    Shift,
)
from clipjax.data.balance import Balanced
from clipjax.data.boxes import Boxes
from clipjax.data.columns import Parquet, SavedDataset
from clipjax.data.crossmodal import Crossmodal
from clipjax.data.evalset import EvalSet, load_eval
from clipjax.data.fields import Array, Example, Field, Image, Spec, Text, View
from clipjax.data.filters import Chosen, Filtered
from clipjax.data.folder import ClassFolder, ImageFolder, PictureFolder
from clipjax.data.found import found_source
from clipjax.data.images import decode
from clipjax.data.loader import Data, Loader
from clipjax.data.order import Order, Plan, Stream
from clipjax.data.sources import Mixture, RandomAccess, Record, Source, Tfds, UnreadableRecord
from clipjax.data.tokenizers import (
    BPE,
    ClipBPE,
    SentencePiece,
    Tokenizer,
    TokenizerFile,
    TokenizerModel,
    load_tokenizer,
)
from clipjax.data.trained_tokenizers import SavedTokenizer, TrainedSentencePiece
from clipjax.data.vectors import Embeddings
from clipjax.data.webdataset import WebDataset

__all__ = [
    "BPE",
    "Array",
    "Augmentation",
    "Balanced",
    "Boxes",
    "CaptionChoice",
    "Chosen",
    "ClassFolder",
    "ClipBPE",
    "ColorJitter",
    "Crossmodal",
    "Data",
    "Embeddings",
    "EvalSet",
    "Example",
    "Field",
    "Filtered",
    "Flip",
    "Image",
    "ImageFolder",
    "Loader",
    "Mixture",
    "Order",
    "Parquet",
    "PictureFolder",
    "Plan",
    "RandomAccess",
    "RandomResizedCrop",
    "Record",
    "Resize",
    "SavedDataset",
    "SavedTokenizer",
    "SentencePiece",
    "Shift",
    "Source",
    "Spec",
    "Stream",
    "Text",
    "Tfds",
    "Tokenizer",
    "TokenizerFile",
    "TokenizerModel",
    "TrainedSentencePiece",
    "UnreadableRecord",
    "View",
    "WebDataset",
    "decode",
    "found_source",
    "load_eval",
    "load_tokenizer",
]
