"""`clipjax import SOURCE --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clipjax.cli.arguments import import_files, model_path, new_parser
from clipjax.errors import ClipjaxError
from clipjax.stores import place

if TYPE_CHECKING:
    from clipjax.pretrained import Pretrained


def main(arguments: list[str]) -> int:
    parser = new_parser(
        "import",
        "Turn weights of OpenAI, OpenCLIP, Hugging Face or big_vision into a model folder, which every "
        "other command takes. The architecture is read from the weights and the files beside them. A run or "
        "a model folder of clipjax may be given too, to change its image size or context length.",
    )
    parser.add_argument(
        "source",
        type=model_path,
        help="a folder, hf://owner/name, or a .safetensors, .npz, .pt, .pth or .bin file",
    )
    parser.add_argument("--out", type=place, required=True, help="the new model folder")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.json",
        help="config.json, open_clip_config.json or an OpenCLIP model configuration, in place of "
        "the one beside the weights",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE",
        help="tokenizer.json, a SentencePiece .model, or bpe_simple_vocab_16e6.txt.gz, in place of "
        "the one beside the weights",
    )  # fmt: skip
    parser.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="resample position embeddings to this size"
    )
    parser.add_argument(
        "--context_length", type=int, metavar="TOKENS", help="keep positions for so many tokens"
    )
    parser.add_argument(
        "--family", help="whose weights they are, where names alone do not tell: openai"
    )
    namespace = parser.parse_args(arguments)
    if namespace.out.exists() and (not namespace.out.is_dir() or any(namespace.out.iterdir())):
        raise ClipjaxError(f"{namespace.out} exists and is not empty: name a new folder")

    from clipjax.checkpoint import FOLDER
    from clipjax.interop.source import is_source
    from clipjax.params import count
    from clipjax.pretrained import is_pretrained

    source = namespace.source
    is_run = source.parent.name == FOLDER or (source / FOLDER).is_dir()
    own = is_pretrained(source) or (is_run and not is_source(source))
    pretrained = _own(namespace) if own else _foreign(namespace)
    pretrained.save(namespace.out)
    tokenizer = pretrained.tokenizer
    seen = []
    if pretrained.image_size:
        seen.append(f"pictures of {pretrained.image_size} px")
    words = f"{tokenizer.vocab_size:,} tokens" if tokenizer else "no tokenizer (give --tokenizer)"
    if pretrained.context_length:
        seen += [f"texts of {pretrained.context_length} tokens", words]
    print(f"{namespace.out}: {count(pretrained.params):,} parameters, " + ", ".join(seen))
    return 0


def _foreign(namespace: argparse.Namespace) -> Pretrained:
    from clipjax.interop import import_weights

    return import_weights(
        namespace.source,
        config=namespace.config,
        tokenizer=namespace.tokenizer,
        family=namespace.family,
        image_size=namespace.image_size,
        context_length=namespace.context_length,
    )


def _own(namespace: argparse.Namespace) -> Pretrained:
    """A run or a model folder of clipjax, at another size; LoRA's updates go into the kernels."""
    from clipjax.interop.resample import with_context_length, with_image_size
    from clipjax.restore import open_pretrained

    for name in ("config", "tokenizer", "family"):
        if getattr(namespace, name) is not None:
            raise ClipjaxError(f"--{name}: {namespace.source} is clipjax's own and says it itself")
    import_files(namespace.imports)
    pretrained = open_pretrained(namespace.source).folded()
    if namespace.image_size is not None:
        pretrained = with_image_size(pretrained, namespace.image_size)
    if namespace.context_length is not None:
        pretrained = with_context_length(pretrained, namespace.context_length)
    pretrained.check()
    return pretrained
