"""`clipjax config CONFIG [--exports] [--dotted.path value ...]`: the resolved configuration as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from clipjax.cli.arguments import new_parser, parse_run
from clipjax.errors import ClipjaxError
from clipjax.stores import place

if TYPE_CHECKING:
    from clipjax.config import Run
    from clipjax.pretrained import Pretrained


def main(arguments: list[str]) -> int:
    """Prints the configuration, or where its model can go."""
    parser = new_parser("config", "Print the resolved configuration as JSON.")
    parser.add_argument(
        "config", type=place, help="a Python config file, a run.json, or a run's folder"
    )
    parser.add_argument(
        "--exports", action="store_true",
        help="instead: which formats of `clipjax export` could hold the model, why not, and what their "
        "libraries would do otherwise; nothing is trained or written",
    )  # fmt: skip
    namespace, run = parse_run(parser, arguments)
    if namespace.exports:
        _print_exports(run)
        return 0
    from clipjax.component import to_json

    print(json.dumps(to_json(run), indent=2, ensure_ascii=False))
    return 0


def _print_exports(run: Run) -> None:
    from clipjax.interop.exports import FORMATS, judge

    pretrained = _untrained(run)
    for to in FORMATS:
        verdict = judge(pretrained, to)
        if verdict.family is None:
            print(f"{to}: no")
        else:
            print(f"{to}: yes, as {verdict.family.name}")
        for name, found in verdict.refusals.items():
            print(f"  {name} cannot express")
            print("\n".join(f"    {each}" for each in found))
        for note in verdict.notes:
            print(f"  note: {note}")


def _untrained(run: Run) -> Pretrained:
    """The run's model without weights, as far as an export looks at it."""
    from clipjax.pretrained import Pretrained

    model = run.model
    while hasattr(model, "base"):  # LoRA goes into the kernels
        model = model.base
    try:
        # A vocabulary of the same kind: what one that is to be trained will know matters to nobody here.
        tokenizer = run.data.tokenizer.build(["a picture"])
    except ClipjaxError as error:
        print(f"without the tokenizer, which cannot be built here: {error}")
        tokenizer = None
    data = run.data
    return Pretrained(model, {}, {}, tokenizer, data.context_length, data.image_size, data.resize)
