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
from clipjax.data.evalset import EvalSet, load_eval
from clipjax.data.folder import ClassFolder, ImageFolder, PictureFolder
from clipjax.data.images import decode
from clipjax.data.loader import Data, Loader
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
from clipjax.data.webdataset import WebDataset

__all__ = [
    "BPE",
    "Augmentation",
    "CaptionChoice",
    "ClassFolder",
    "ClipBPE",
    "ColorJitter",
    "Data",
    "EvalSet",
    "Flip",
    "ImageFolder",
    "Loader",
    "Mixture",
    "PictureFolder",
    "RandomAccess",
    "RandomResizedCrop",
    "Record",
    "Resize",
    "SentencePiece",
    "Shift",
    "Source",
    "Tfds",
    "Tokenizer",
    "TokenizerFile",
    "TokenizerModel",
    "UnreadableRecord",
    "WebDataset",
    "decode",
    "load_eval",
    "load_tokenizer",
]
