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
from clipjax.data.loader import Data, Loader
from clipjax.data.sources import Mixture, RandomAccess, Record, Source, Tfds, UnreadableRecord
from clipjax.data.tokenizers import (
    BPE,
    SentencePiece,
    Tokenizer,
    TokenizerFile,
    TokenizerModel,
    load_tokenizer,
)

__all__ = [
    "BPE",
    "Augmentation",
    "CaptionChoice",
    "ColorJitter",
    "Data",
    "EvalSet",
    "Flip",
    "Loader",
    "Mixture",
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
    "load_eval",
    "load_tokenizer",
]
