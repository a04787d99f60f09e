"""The tokenizer of an export: the files that transformers and OpenCLIP read it from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from clipjax.data import TokenizerModel
from clipjax.errors import ClipjaxError
from clipjax.interop.family import pads_are_unseen
from clipjax.pretrained import Pretrained

LEGACY_EOS = 2
"""transformers' CLIP takes this eos_token_id for "the highest id of the text", as its first
configurations had it wrong; a vocabulary whose end token has this number must be renumbered."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer ready to be written beside weights.

    Attributes:
      files: contents by name.
      pad_id: the padding token that its configuration names.
    """

    files: dict[str, bytes]
    pad_id: int


def tokenizer_files(
    pretrained: Pretrained, siglip: bool = False, mends: bool = False
) -> TokenizerFiles:
    """The files from which `transformers.AutoTokenizer` makes the tokenizer.

    Args:
      pretrained: has a tokenizer.
      siglip: whether it is for SigLIP, which sees its padding, and whose SentencePiece tokenizer a
        vocabulary of that kind may be written as.
      mends: whether the reader mends texts before, as OpenCLIP does.

    Raises:
      ClipjaxError: what the tokenizer does cannot be written so that others do the same.
    """
    model: Any = pretrained.model
    tokenizer = pretrained.tokenizer
    assert tokenizer is not None
    name, contents = tokenizer.standalone(cleaning=not (mends and tokenizer.repairs))
    config: dict[str, Any] = {
        "model_max_length": pretrained.context_length,
        "padding_side": "right",
    }
    pad_id = tokenizer.pad_id
    if name == "tokenizer.json":
        special = {t["id"] for t in json.loads(contents)["added_tokens"] if t["special"]}
        if pad_id not in special:
            # A word as padding (OpenAI's "!") would be cut out of texts as a special token.
            if not pads_are_unseen(model.text):
                raise ClipjaxError(
                    f"the tokenizer pads with {tokenizer.token(pad_id)!r}, which is no special token, and "
                    "this model sees its padding: other libraries would treat texts that hold it wrongly"
                )
            pad_id = tokenizer.eos_id
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "<eos>" in a text is text
        }
    elif siglip and tokenizer.bos_id is None and tokenizer.clean == "canonical":
        config |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}
    else:
        raise ClipjaxError(
            "a SentencePiece tokenizer can be exported for SigLIP only, without bos and with "
            "clean='canonical'; convert it to a tokenizer.json first"
        )
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": pad_id}
    config |= {f"{r}_token": tokenizer.token(i) for r, i in roles.items() if i is not None}
    if siglip:  # no attention mask: training saw the padding, and so must whoever reads this
        config["model_input_names"] = ["input_ids"]
    return TokenizerFiles({name: contents, "tokenizer_config.json": _json(config)}, pad_id)


def renumbered(pretrained: Pretrained) -> Pretrained:
    """The same model, whose end-of-text token has the last number of the vocabulary.

    The rows of the token embedding are swapped with the tokens' numbers, so no output changes.
    """
    model: Any = pretrained.model
    old, new = model.text.eos_id, model.text.vocab_size - 1
    text = pretrained.params["text"]
    embedding = np.array(text["embedding"])
    embedding[[old, new]] = embedding[[new, old]]
    pads = {old: new, new: old}.get(model.text.pad_id, model.text.pad_id)
    tower = dataclasses.replace(model.text, eos_id=new, pad_id=pads)
    tokenizer = pretrained.tokenizer
    return dataclasses.replace(
        pretrained,
        model=dataclasses.replace(model, text=tower),
        params=pretrained.params | {"text": text | {"embedding": embedding}},
        tokenizer=None if tokenizer is None else _swapped(tokenizer, old, new),
    )


def _swapped(tokenizer: TokenizerModel, old: int, new: int) -> TokenizerModel:
    from tokenizers import Tokenizer as Vocabulary

    name, contents = tokenizer.standalone(cleaning=False)
    if name != "tokenizer.json":
        raise ClipjaxError(
            f"transformers' CLIP cannot have an end-of-text token of id {old}, and a SentencePiece "
            "vocabulary cannot be renumbered: convert it to a tokenizer.json first"
        )
    facts = json.loads(contents)
    swap = {old: new, new: old}
    vocabulary = facts["model"]["vocab"]
    if isinstance(vocabulary, dict):
        facts["model"]["vocab"] = {token: swap.get(i, i) for token, i in vocabulary.items()}
    else:  # a unigram's: token and score, in the order of their ids
        vocabulary[old], vocabulary[new] = vocabulary[new], vocabulary[old]
    for token in facts["added_tokens"]:
        token["id"] = swap.get(token["id"], token["id"])
    facts["added_tokens"].sort(key=lambda token: token["id"])
    facts["post_processor"] = None
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    pad, bos, eos = (None if i is None else swap.get(i, i) for i in ids)
    assert pad is not None and eos is not None
    swapped = Vocabulary.from_str(json.dumps(facts))
    return TokenizerModel("tokenizers", swapped, pad, bos, eos, tokenizer.clean)


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
