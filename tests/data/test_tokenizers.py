import hashlib

import numpy as np
import pytest

from clipjax.component import from_json, to_json
from clipjax.data import BPE, SentencePiece, TokenizerFile, load_tokenizer
from clipjax.errors import ClipjaxError

CAPTIONS = [
    *("a red apple", "a green apple", "two red apples", "the cat on the mat", "a photo of a cat"),
    *("grinning face", "嘿嘿", "苹果", "تفاحة حمراء", "яблоко", "naïve café", "a dog and a cat"),
] * 5
UNSEEN = ["Ünïcode ✓ 🙂", "  two  spaces ", "<eos> is text", "日本語", "tab\tand\nline"]


@pytest.fixture(scope="module")
def bpe():
    return BPE(400, lowercase=False).build(CAPTIONS)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=45,
        pad_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "vocabulary.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_any_text_comes_back(bpe):
    texts = [*CAPTIONS[:12], *UNSEEN]
    assert bpe.decode(bpe.encode(texts, 64)) == texts


def test_rows_are_bos_tokens_eos_pad(bpe):
    rows = bpe.encode(["a red apple", ""], 12)
    assert rows.shape == (2, 12) and rows.dtype == np.int32
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
    for row in rows:
        (end,) = np.flatnonzero(row == bpe.eos_id)
        assert row[0] == bpe.bos_id
        assert (row[1:end] > 2).all() and (row[end + 1 :] == bpe.pad_id).all()
    assert rows[1].tolist() == [1, 2] + [0] * 10
    assert rows.max() < bpe.vocab_size <= 400


def test_a_long_text_keeps_its_beginning_and_eos(bpe):
    text = "a red apple and the cat on the mat"
    whole = bpe.encode([text], 64)[0]
    cut = bpe.encode([text], 6)[0]
    assert cut.tolist() == [*whole[:5].tolist(), bpe.eos_id]
    # A text that fits to the last place is not cut.
    length = int(np.flatnonzero(whole == bpe.eos_id)[0]) + 1
    np.testing.assert_array_equal(bpe.encode([text], length)[0], whole[:length])


def test_training_is_deterministic(tmp_path):
    digests = set()
    for name in ("a", "b"):
        BPE(500).build(iter(CAPTIONS)).save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_merges_are_learned_and_case_is_folded():
    model = BPE(400).build(CAPTIONS)
    assert (model.encode(["a red apple"], 16) > 2).sum() == 3  # three words, each one token
    np.testing.assert_array_equal(model.encode(["APPLE"], 9), model.encode(["apple"], 9))
    assert model.decode(model.encode(["APPLE"], 9)) == ["apple"]


def test_max_captions_bounds_the_training_text():
    def endless():
        while True:
            yield "a red apple"

    assert BPE(300, max_captions=50).build(endless()).vocab_size <= 300


def assert_same(a, b):
    texts = [*CAPTIONS[:12], *UNSEEN]
    np.testing.assert_array_equal(a.encode(texts, 32), b.encode(texts, 32))
    assert (a.vocab_size, a.pad_id, a.bos_id, a.eos_id) == (
        *(b.vocab_size, b.pad_id, b.bos_id, b.eos_id),
    )


def test_saved_tokenizers_open_unchanged(bpe, sentencepiece_file, tmp_path):
    models = {
        "bpe": bpe,
        "sp": SentencePiece(sentencepiece_file, bos="", clean="canonical").build(),
    }
    for name, model in models.items():
        model.save(tmp_path / name)
        assert_same(model, load_tokenizer(tmp_path / name))


def test_tokenizer_file_finds_its_special_tokens(bpe, tmp_path):
    bpe.save(tmp_path)
    assert_same(bpe, TokenizerFile(str(tmp_path / "tokenizer.json")).build())


def foreign_tokenizer(path, special, **padding):
    """A tokenizer.json of words, with post-processing, padding and truncation of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", "a", "cat", "dog", *special]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.add_special_tokens(list(special))
    if "[CLS]" in special:
        vocabulary.post_processor = processors.BertProcessing(
            ("[SEP]", words.index("[SEP]")), ("[CLS]", words.index("[CLS]"))
        )
    vocabulary.enable_truncation(3)
    vocabulary.enable_padding(length=9, **padding)
    vocabulary.save(str(path))


def test_a_files_own_padding_truncation_and_framing_are_replaced(tmp_path):
    path = tmp_path / "tokenizer.json"
    special = ["[CLS]", "[SEP]", "[PAD]"]
    foreign_tokenizer(path, special, pad_token="[PAD]", pad_id=6)
    model = TokenizerFile(str(path)).build()
    assert model.encode(["a cat a dog"], 8).tolist() == [[4, 1, 2, 1, 3, 5, 6, 6]]


def test_special_tokens_by_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign_tokenizer(path, ["<x>", "</s>"], pad_token="</s>", pad_id=5)
    model = TokenizerFile(str(path)).build()  # a vocabulary without a first token, as T5's
    assert (model.bos_id, model.encode(["a cat"], 5).tolist()) == (None, [[1, 2, 5, 5, 5]])
    named = TokenizerFile(str(path), pad="a", bos="<x>", eos="dog").build()
    assert named.encode(["cat"], 5).tolist() == [[4, 2, 3, 1, 1]]
    for role in ("pad", "bos", "eos"):
        with pytest.raises(ClipjaxError, match=rf"no token '<y>' to use as {role}"):
            TokenizerFile(str(path), **{role: "<y>"}).build()


def test_missing_special_token_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign_tokenizer(path, ["</s>"], pad_token="", pad_id=0)
    with pytest.raises(ClipjaxError, match=r"no pad token.*pad=\.\.\."):
        TokenizerFile(str(path)).build()


def test_sentencepiece_matches_the_library(sentencepiece_file):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_file)
    model = SentencePiece(sentencepiece_file).build()
    assert (model.pad_id, model.bos_id, model.eos_id) == (3, 1, 2)
    for text in CAPTIONS[:6]:
        ids = [1, *library.encode(text), 2]
        assert model.encode([text], 40)[0].tolist() == ids + [3] * (40 - len(ids))
        assert model.decode(model.encode([text], 40)) == [text]
    assert model.vocab_size == 45


def test_cleaning(sentencepiece_file):
    def rows(clean, text):
        return SentencePiece(sentencepiece_file, clean=clean).build().encode([text], 32).tolist()

    assert rows("lower", "A  Red APPLE") == rows("keep", "a red apple")
    assert rows("lower", "a red, apple.") != rows("keep", "a red apple")
    assert rows("canonical", "A (red), apple!") == rows("keep", "a red apple")
    assert rows("canonical", "red_apple") == rows("keep", "red apple")  # as big_vision and OpenCLIP


def test_no_room_for_text_is_refused(bpe):
    with pytest.raises(ClipjaxError, match="context_length=2"):
        bpe.encode(["cat"], 2)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for config, message in [
        (TokenizerFile(str(tmp_path / "tokenizer.json")), "is not a tokenizer.json"),
        (TokenizerFile(str(tmp_path / "tokeniser.json")), "no file.*did you mean 'tokenizer.json'"),
        (SentencePiece(str(tmp_path / "tokenizer.json")), "is not a SentencePiece model"),
        (SentencePiece(str(tmp_path / "none" / "x.model")), "there is no file"),
    ]:
        with pytest.raises(ClipjaxError, match=message):
            config.build()
    with pytest.raises(ClipjaxError, match="holds no saved tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ClipjaxError, match="no captions to train on"):
        BPE(300).build(iter(()))
    with pytest.raises(ClipjaxError, match="vocab_size=100"):
        BPE(100)


def test_configs_survive_json():
    for config in (BPE(300), TokenizerFile("x", pad="<p>"), SentencePiece("y", clean="lower")):
        assert from_json(to_json(config)) == config
