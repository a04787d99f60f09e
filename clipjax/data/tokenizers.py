"""Tokenizers: a byte-level BPE trained on the run's captions, or a vocabulary from a file."""

from __future__ import annotations

import dataclasses
import gzip
import html
import io
import itertools
import json
import string
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipjax.component import Component
from clipjax.data.captions import encodable
from clipjax.errors import ClipjaxError, did_you_mean

_FACTS_FILE = "tokenizer_facts.json"
_VOCABULARY_FILES = {"tokenizers": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Clean = Literal["keep", "lower", "canonical", "clip", "repair", "repair_lower", "repair_canonical"]
_REPAIRING = ("clip", "repair", "repair_lower", "repair_canonical")


class TokenizerModel:
    """A vocabulary, ready to encode.

    Attributes:
      vocab_size: number of token ids; every id is below it.
      pad_id: fills up rows.
      bos_id: stands first in every row, or None for a vocabulary without one.
      eos_id: ends every row, also a truncated one, unless `ends` is False.
    """

    def __init__(
        self,
        kind: Literal["tokenizers", "sentencepiece"],
        vocabulary: Any,
        pad_id: int,
        bos_id: int | None,
        eos_id: int,
        clean: Clean = "keep",
        ends: bool = True,
    ):
        self._kind, self._vocabulary, self._clean = kind, vocabulary, clean
        self._ends = ends
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        if kind == "tokenizers":
            self.vocab_size: int = vocabulary.get_vocab_size()
            # A caption that holds the text "<eos>" is text: it must not end its row.
            vocabulary.encode_special_tokens = True
        else:
            self.vocab_size = vocabulary.vocab_size()

    def encode(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Encodes texts as rows `bos, tokens..., eos, pad...`; a long text loses its end, not eos.

        Args:
          texts: n texts.
          context_length: L, the length of a row, special tokens counted.

        Returns:
          int32 [n, L].
        """
        start = 0 if self.bos_id is None else 1
        fixed = start + self._ends
        if context_length <= fixed:
            raise ClipjaxError(
                f"context_length={context_length} leaves no room for text beside {fixed} special "
                "tokens; raise it"
            )
        room = context_length - fixed
        rows = np.full((len(texts), context_length), self.pad_id, np.int32)
        if self.bos_id is not None:
            rows[:, 0] = self.bos_id
        for row, ids in zip(rows, self._ids([self._cleaned(t) for t in texts]), strict=True):
            ids = ids[:room]
            row[start : start + len(ids)] = ids
            if self._ends:
                row[start + len(ids)] = self.eos_id
        return rows

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, [n, L]: without bos, up to eos."""
        texts = []
        for row in np.asarray(ids):
            kept = list(itertools.takewhile(lambda i: i != self.eos_id, map(int, row)))
            kept = [i for i in kept if i not in (self.bos_id, self.pad_id)]
            texts.append(self._vocabulary.decode(kept))
        return texts

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _VOCABULARY_FILES[self._kind]
        if self._kind == "tokenizers":
            self._vocabulary.save(str(file))
        else:
            file.write_bytes(self._vocabulary.serialized_model_proto())
        facts = {
            "kind": self._kind,
            "pad_id": self.pad_id,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "clean": self._clean,
            "ends": self._ends,
        }
        (folder / _FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")

    def token(self, i: int) -> str:
        """The token of an id."""
        if self._kind == "sentencepiece":
            return self._vocabulary.id_to_piece(i)
        return self._vocabulary.id_to_token(i)

    @property
    def clean(self) -> Clean:
        """What happens to texts before they are encoded."""
        return self._clean

    @property
    def repairs(self) -> bool:
        """Whether texts are mended (ftfy, HTML entities) before they are encoded, as OpenCLIP does."""
        return self._clean in _REPAIRING

    def standalone(self, cleaning: bool = True) -> tuple[str, bytes]:
        """The vocabulary as others read it: a file's usual name, and its contents.

        A `tokenizer.json` holds all that `encode` does by itself, bos and eos included, but for
        padding and truncation. Of what mends texts it holds all that goes character by character
        (see `_cleaning`). A SentencePiece model has no room for cleaning.

        Args:
          cleaning: False leaves `clean` out, for a reader who has it already.
        """
        if self._kind == "sentencepiece":
            return "spiece.model", self._vocabulary.serialized_model_proto()
        from tokenizers import Tokenizer as Vocabulary
        from tokenizers import normalizers, processors

        vocabulary = Vocabulary.from_str(self._vocabulary.to_str())
        own = [] if vocabulary.normalizer is None else [vocabulary.normalizer]
        first = _cleaning(self._clean) if cleaning else []
        vocabulary.normalizer = normalizers.Sequence(first + own)
        before, after = self.bos_id, self.eos_id if self._ends else None
        tokens = [(self.token(i), i) for i in (before, after) if i is not None]
        template = [name for name, _ in tokens]
        template.insert(0 if before is None else 1, "$A")
        vocabulary.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=tokens
        )
        vocabulary.add_special_tokens(list(dict.fromkeys(name for name, _ in tokens)))
        return "tokenizer.json", vocabulary.to_str(pretty=True).encode()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._kind == "sentencepiece":
            return self._vocabulary.encode(texts)
        return [e.ids for e in self._vocabulary.encode_batch_fast(texts, add_special_tokens=False)]

    def _cleaned(self, text: str) -> str:
        return cleaned(text, self._clean)


def cleaned(text: str, clean: Clean) -> str:
    """A text as `clean` makes it, before any vocabulary."""
    text = encodable(text)
    if clean == "keep":
        return text
    if clean in _REPAIRING:
        text = _repaired(text)
    if clean != "repair":
        text = text.lower()
    if clean in ("canonical", "repair_canonical"):
        text = text.replace("_", " ").translate(_PUNCTUATION)
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Tokenizer(Component):
    """Where the vocabulary comes from."""

    @property
    def trains(self) -> bool:
        """Whether `build` reads the captions."""
        return False

    def build(self, captions: Iterable[str]) -> TokenizerModel:
        """Makes the tokenizer; `captions` are read only by one that must be trained."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BPE(Tokenizer):
    """Byte-level BPE trained on the run's captions (Sennrich et al. 2016, arXiv:1508.07909).

    Deterministic. Any text has an encoding, since all 256 bytes are tokens.
    Ids: pad 0, bos 1, eos 2.
    """

    vocab_size: int = 8192
    """Greatest number of tokens; a small corpus may give fewer."""
    lowercase: bool = True
    """Whether upper and lower case are the same."""
    max_captions: int = 1_000_000
    """Train on the first so many captions."""
    clean: Literal["keep", "repair"] = "keep"
    """keep texts as they are, or repair them first, as OpenCLIP does to every text: mojibake, curly
    quotes, full-width letters and ligatures (ftfy), HTML entities, runs of spaces."""

    def __post_init__(self):
        if self.clean not in ("keep", "repair"):
            raise ClipjaxError(f"BPE: clean={self.clean!r} is neither 'keep' nor 'repair'")
        if self.vocab_size < 259:
            raise ClipjaxError(
                f"BPE: vocab_size={self.vocab_size} must be at least 259: "
                "256 bytes and pad, bos, eos"
            )
        if self.max_captions < 1:
            raise ClipjaxError(f"BPE: max_captions={self.max_captions} must be >= 1")

    @property
    def trains(self):
        return True

    def build(self, captions):
        from tokenizers import Tokenizer as Vocabulary
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        vocabulary = Vocabulary(models.BPE())
        steps = [normalizers.NFC()] + ([normalizers.Lowercase()] if self.lowercase else [])
        vocabulary.normalizer = normalizers.Sequence(steps)
        vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        vocabulary.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        captions = (cleaned(text, self.clean) for text in captions)
        captions = itertools.islice(captions, self.max_captions)
        first = next(captions, None)
        if first is None:
            raise ClipjaxError(
                "BPE: there are no captions to train on; check the source's captions and the "
                "languages that the run chooses"
            )
        vocabulary.train_from_iterator(itertools.chain([first], captions), trainer)
        return TokenizerModel("tokenizers", vocabulary, 0, 1, 2, self.clean)


@dataclasses.dataclass(frozen=True)
class TokenizerFile(Tokenizer):
    """A `tokenizer.json`, as Hugging Face `tokenizers` writes it."""

    path: str
    """The file."""
    pad: str | None = None
    """Padding token; default: the file's own, or a token with a usual name."""
    bos: str | None = None
    """First token; "" is none; default: a token with a usual name, else none."""
    eos: str | None = None
    """Last token; default: a token with a usual name."""
    clean: Clean = "keep"
    """Before encoding: lower, canonical (that, `_` as a space and no other ASCII punctuation:
    SigLIP), clip (OpenAI's); OpenCLIP mends texts first: repair, repair_lower, repair_canonical."""
    ends: bool = True
    """Whether a text is ended by eos (Gemma's and TIPS's are not)."""

    def build(self, captions=()):
        from tokenizers import Tokenizer as Vocabulary

        path = _existing(self.path)
        try:
            vocabulary = Vocabulary.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ClipjaxError(
                f"{self.path!r} is not a tokenizer.json that tokenizers reads ({error})"
            ) from error
        own_pad = (vocabulary.padding or {}).get("pad_token")
        vocabulary.no_padding()
        vocabulary.no_truncation()
        find = vocabulary.token_to_id
        return TokenizerModel(
            "tokenizers",
            vocabulary,
            pad_id=_special(self, "pad", find, [own_pad, *_PAD_NAMES]),
            bos_id=_optional_special(self, "bos", find, _BOS_NAMES),
            eos_id=_special(self, "eos", find, _EOS_NAMES),
            clean=self.clean,
            ends=self.ends,
        )


@dataclasses.dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A SentencePiece `.model` file (Kudo and Richardson 2018, arXiv:1808.06226)."""

    path: str
    """The file."""
    pad: str | None = None
    """Padding piece; default: the file's own, or a piece with a usual name."""
    bos: str | None = None
    """First piece; "" is none; default: the file's own, else none."""
    eos: str | None = None
    """Last piece; default: the file's own, or a piece with a usual name."""
    clean: Clean = "keep"
    """Before encoding: lower, canonical (that, `_` as a space and no other ASCII punctuation:
    SigLIP), clip (OpenAI's); OpenCLIP mends texts first: repair, repair_lower, repair_canonical."""
    ends: bool = True
    """Whether a text is ended by eos (Gemma's and TIPS's are not)."""

    def build(self, captions=()):
        path = _existing(self.path)
        try:
            vocabulary = _sentencepiece(path)
        except (OSError, RuntimeError) as error:
            raise ClipjaxError(f"{self.path!r} is not a SentencePiece model ({error})") from error

        def find(piece):
            i = vocabulary.piece_to_id(piece)
            return i if vocabulary.id_to_piece(i) == piece else None

        def own(i):
            return [vocabulary.id_to_piece(i)] if i >= 0 else []

        return TokenizerModel(
            "sentencepiece",
            vocabulary,
            pad_id=_special(self, "pad", find, own(vocabulary.pad_id()) + _PAD_NAMES),
            bos_id=_optional_special(self, "bos", find, own(vocabulary.bos_id())),
            eos_id=_special(self, "eos", find, own(vocabulary.eos_id()) + _EOS_NAMES),
            clean=self.clean,
            ends=self.ends,
        )


@dataclasses.dataclass(frozen=True)
class ClipBPE(Tokenizer):
    """OpenAI's BPE for CLIP (arXiv:2103.00020), from its merges: `bpe_simple_vocab_16e6.txt.gz`.

    Texts are repaired (ftfy), their HTML entities resolved, and lower-cased before, as OpenAI and
    OpenCLIP do. Ids: 256 bytes, the same ending a word, the merges, then bos and eos; padding is 0.
    """

    path: str
    """The merges, one a line after a first line that is skipped; plain or gzip."""

    def build(self, captions=()):
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Vocabulary

        end = "</w>"
        alphabet = _byte_alphabet()
        merges = _read_merges(_existing(self.path))
        tokens = [*alphabet, *(letter + end for letter in alphabet), *(a + b for a, b in merges)]
        vocabulary_of = {token: i for i, token in enumerate(tokens)}
        for pair in merges:
            for part in pair:
                if part not in vocabulary_of:
                    raise ClipjaxError(
                        f"{self.path!r} merges {part!r}, which is no token before that"
                    )
        bos, eos = "<|startoftext|>", "<|endoftext|>"
        ids = vocabulary_of | {bos: len(vocabulary_of), eos: len(vocabulary_of) + 1}
        vocabulary = Vocabulary(models.BPE(ids, merges, end_of_word_suffix=end, unk_token=eos))
        # For whoever reads the tokenizer.json: here, `clean` does this and more before.
        vocabulary.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        word = Regex(r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(word, "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        vocabulary.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(bos, ids[bos]), (eos, ids[eos])]
        )
        vocabulary.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Replace(end, " "), decoders.Strip(" ", 0, 1)]
        )
        vocabulary.add_special_tokens([bos, eos])
        return TokenizerModel("tokenizers", vocabulary, 0, ids[bos], ids[eos], "clip")


def load_tokenizer(folder: str | Path) -> TokenizerModel:
    """Opens what `TokenizerModel.save` wrote.

    Raises:
      ClipjaxError: `folder` holds no tokenizer of clipjax.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / _FACTS_FILE).read_text())
        file = _existing(str(folder / _VOCABULARY_FILES[facts.pop("kind")]))
    except (OSError, ValueError, KeyError) as error:
        raise ClipjaxError(f"{str(folder)!r} holds no saved tokenizer ({error})") from error
    if file.name == _VOCABULARY_FILES["sentencepiece"]:
        return TokenizerModel("sentencepiece", _sentencepiece(file), **facts)
    from tokenizers import Tokenizer as Vocabulary

    return TokenizerModel("tokenizers", Vocabulary.from_file(str(file)), **facts)


_PAD_NAMES = ["<pad>", "[PAD]", "<|pad|>", "<|padding|>"]
_BOS_NAMES = ["<bos>", "<s>", "[CLS]", "<|startoftext|>", "<start_of_text>", "[BOS]"]
_EOS_NAMES = ["<eos>", "</s>", "[SEP]", "<|endoftext|>", "<end_of_text>", "[EOS]"]


_MAX_MERGES = 16 * 2**20  # bytes; CLIP's merges have three million
_CLIP_MERGES = 49152 - 256 - 2  # how many of the file's merges CLIP uses


def _read_merges(path: Path) -> list[tuple[str, str]]:
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                raw = file.read(_MAX_MERGES)
        text = raw.decode("utf-8")
        pairs = [line.split() for line in text.split("\n")[1 : _CLIP_MERGES + 1] if line]
        return [(first, second) for first, second in pairs]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ClipjaxError(
            f"{str(path)!r} is no list of merges, two tokens a line ({error})"
        ) from error


def _byte_alphabet() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE: printable ones first, as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def _cleaning(clean: Clean) -> list[Any]:
    """The normalizers of `tokenizers` that clean as `cleaned` does ("clip" brings its own).

    Of what mends texts: quotes, widths, ligatures, the common HTML entities. Neither mojibake nor
    the other entities can be told character by character.
    """
    from tokenizers import Regex, normalizers

    if clean in ("keep", "clip"):
        return []
    steps: list[Any] = _mending() if clean in _REPAIRING else []
    if clean != "repair":
        steps.append(normalizers.Lowercase())
    if clean in ("canonical", "repair_canonical"):
        steps.append(normalizers.Replace("_", " "))
        marks = "".join("\\" + mark for mark in string.punctuation)
        steps.append(normalizers.Replace(Regex(f"[{marks}]"), ""))
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def _mending() -> list[Any]:
    """ftfy's character tables and the common HTML entities, as normalizers of `tokenizers`."""
    from ftfy import chardata
    from tokenizers import Regex, normalizers

    entities = [("&amp;", "&")] * 3  # resolved so often, inside out
    entities += [("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&nbsp;", " ")]
    entities += [("&#39;", "'"), ("&#x27;", "'"), ("&apos;", "'")]
    letters = [(chr(i), text) for i, text in (chardata.LIGATURES | chardata.WIDTH_MAP).items()]
    quotes = {"'": chardata.SINGLE_QUOTE_RE, '"': chardata.DOUBLE_QUOTE_RE}
    return [
        *(normalizers.Replace(old, new) for old, new in entities + letters),
        *(normalizers.Replace(Regex(old.pattern), new) for new, old in quotes.items()),
        normalizers.NFC(),
    ]


def _repaired(text: str) -> str:
    """Mends broken encodings and resolves HTML entities, as CLIP does before it lower-cases."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _special(config: Any, role: str, find: Any, names: Sequence[str | None]) -> int:
    """The id of the token the config names, or of the first of `names` that exists."""
    asked = getattr(config, role)
    for name in [asked] if asked else names:
        found = find(name) if name else None
        if found is not None:
            return found
    where = f"{type(config).__name__}({config.path!r})"
    if asked:
        raise ClipjaxError(f"{where}: there is no token {asked!r} to use as {role}")
    usual = ", ".join(n for n in names if n)
    raise ClipjaxError(
        f"{where}: found no {role} token (looked for {usual}); name one of its tokens "
        f"with {role}=..."
    )


def _optional_special(config: Any, role: str, find: Any, names: Sequence[str]) -> int | None:
    asked = getattr(config, role)
    if asked == "" or (asked is None and all(find(name) is None for name in names)):
        return None
    return _special(config, role, find, names)


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        near = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ClipjaxError(f"there is no file {path!r}{did_you_mean(file.name, near)}")
    return file


def _sentencepiece(path: Path) -> Any:
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor()
    vocabulary.load_from_serialized_proto(path.read_bytes())
    return vocabulary
