"""SentencePiece trained on the run's captions, and tokenizers trained beforehand (`clipjax data tokenizer`)."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path
from typing import Literal

from clipjax.data.tokenizers import Tokenizer, TokenizerModel, load_tokenizer
from clipjax.errors import ClipjaxError


@dataclasses.dataclass(frozen=True)
class TrainedSentencePiece(Tokenizer):
    """SentencePiece trained on the run's captions. Deterministic. Ids: pad 0, bos 1, eos 2, unknown 3."""

    vocab_size: int = 32_000
    """Number of pieces; fewer where the captions do not give so many."""
    kind: Literal["unigram", "bpe"] = "unigram"
    """The model of a text: the likeliest pieces, or merges."""
    coverage: float = 0.9995
    """Share of the characters that get a piece of their own; bytes stand for the others."""
    max_captions: int = 1_000_000
    """Train on the first so many captions."""

    def __post_init__(self):
        if self.kind not in ("unigram", "bpe"):
            raise ClipjaxError(
                f"TrainedSentencePiece: kind={self.kind!r} is neither 'unigram' nor 'bpe'"
            )
        if self.vocab_size < 300:
            raise ClipjaxError(
                f"TrainedSentencePiece: vocab_size={self.vocab_size} must be at least 300: 256 bytes, pad, "
                "bos, eos, unknown, and some pieces"
            )
        if self.max_captions < 1:
            raise ClipjaxError(
                f"TrainedSentencePiece: max_captions={self.max_captions} must be >= 1"
            )
        if not 0 < self.coverage <= 1:
            raise ClipjaxError(f"TrainedSentencePiece: coverage={self.coverage} must be in (0, 1]")

    @property
    def trains(self):
        return True

    def build(self, captions):
        import sentencepiece

        captions = itertools.islice(captions, self.max_captions)
        first = next(captions, None)
        if first is None:
            raise ClipjaxError(
                "TrainedSentencePiece: there are no captions to train on; check the source's captions and the "
                "languages that the run chooses"
            )
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], captions),
                model_writer=model,
                vocab_size=self.vocab_size,
                hard_vocab_limit=False,
                model_type=self.kind,
                character_coverage=self.coverage,
                byte_fallback=True,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                num_threads=1,  # with several, the order of sums is another each time
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ClipjaxError(
                f"TrainedSentencePiece: training failed ({reason}); lower vocab_size"
            ) from error
        vocabulary = sentencepiece.SentencePieceProcessor()
        vocabulary.load_from_serialized_proto(model.getvalue())
        return TokenizerModel("sentencepiece", vocabulary, 0, 1, 2)


@dataclasses.dataclass(frozen=True)
class SavedTokenizer(Tokenizer):
    """What `clipjax data tokenizer` wrote, or any `TokenizerModel.save`."""

    folder: str
    """The folder."""

    def build(self, captions=()):
        return load_tokenizer(Path(self.folder).expanduser())
