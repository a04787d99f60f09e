"""OpenAI's BPE: the same ids as OpenCLIP's tokenizer on 2,000 strings, from the merges or tokenizer.json."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from clipjax import ClipjaxError
from clipjax.component import from_json, to_json
from clipjax.data import ClipBPE, TokenizerFile, load_tokenizer

BYTES = 512  # ids before those of merges
BOS, EOS = 49406, 49407


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parent / "goldens" / "clip_bpe.npz"))


@pytest.fixture(scope="module")
def texts(golden):
    ends = np.cumsum(golden["lengths"].astype(int))
    raw = golden["texts"].tobytes()
    starts = [0, *ends[:-1]]
    return [raw[a:b].decode() for a, b in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def merges_file(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(
        gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n' + golden["merges"].tobytes())
    )
    return path


def in_full_vocabulary(ids, ranks, tokenizer):
    """Ids of the excerpt of merges -> ids of all of them."""
    table = np.arange(tokenizer.vocab_size)
    table[BYTES : BYTES + len(ranks)] = BYTES + ranks.astype(int)
    table[[tokenizer.bos_id, tokenizer.eos_id]] = BOS, EOS
    return table[ids]


def test_ids_are_openclips(golden, texts, merges_file):
    assert len(texts) == 2000
    tokenizer = ClipBPE(str(merges_file)).build()
    assert tokenizer.vocab_size == BYTES + len(golden["ranks"]) + 2
    ids = in_full_vocabulary(tokenizer.encode(texts, 77), golden["ranks"], tokenizer)
    wrong = [
        t
        for t, ours, theirs in zip(texts, ids, golden["ids"], strict=True)
        if (ours != theirs).any()
    ]
    assert not wrong


def test_a_saved_tokenizer_and_its_standalone_file_agree(texts, merges_file, tmp_path):
    tokenizer = ClipBPE(str(merges_file)).build()
    tokenizer.save(tmp_path / "saved")
    expected = tokenizer.encode(texts, 77)
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved").encode(texts, 77), expected)
    name, contents = tokenizer.standalone()
    (tmp_path / name).write_bytes(contents)
    opened = TokenizerFile(str(tmp_path / name), pad="!", clean="clip").build()
    assert (opened.pad_id, opened.bos_id, opened.eos_id) == (0, tokenizer.bos_id, tokenizer.eos_id)
    np.testing.assert_array_equal(opened.encode(texts, 77), expected)


def test_texts_come_back_lower_case(merges_file):
    tokenizer = ClipBPE(str(merges_file)).build()
    texts = ["A Photo of &amp; two cats", "日本語 ✓", "don't"]
    assert tokenizer.decode(tokenizer.encode(texts, 77)) == [
        "a photo of & two cats",
        "日本語 ✓",
        "don 't",
    ]


def test_it_is_a_component_and_bad_merges_are_named(merges_file, tmp_path):
    config = ClipBPE(str(merges_file))
    assert from_json(to_json(config)) == config
    for contents, message in [
        (b"#version\na b c\n", "no list of merges"),
        (b"#version\nzz y\n", "merges 'zz', which is no token"),
        (gzip.compress(b"#version\na b\n")[:-9], "no list of merges"),
        (b"#version\n\xff\xff a\n", "no list of merges"),
    ]:
        path = tmp_path / "merges.txt"
        path.write_bytes(contents)
        with pytest.raises(ClipjaxError, match=message):
            ClipBPE(str(path)).build()
    with pytest.raises(ClipjaxError, match="there is no file"):
        ClipBPE(str(tmp_path / "none.txt")).build()
