"""`clipjax export RUN_OR_MODEL --to FORMAT --out DIR`."""

from __future__ import annotations

from clipjax.cli.arguments import import_files, model_path, new_parser
from clipjax.stores import place


def main(arguments: list[str]) -> int:
    from clipjax.interop.exports import FORMATS

    parser = new_parser(
        "export",
        "Write a run or model as other libraries load it: weights, configuration, preprocessing and "
        "tokenizer. A model that the format cannot express is refused by the field.",
    )
    parser.add_argument(
        "model",
        type=model_path,
        help="a run, a checkpoint, a model folder, hf://owner/name, or any weights",
    )
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=", ".join([*FORMATS, "clipjax"])
    )
    parser.add_argument("--out", type=place, required=True, help="a new folder")
    namespace = parser.parse_args(arguments)
    import_files(namespace.imports)

    from clipjax.interop import export_weights
    from clipjax.restore import open_pretrained

    pretrained = open_pretrained(namespace.model)
    if namespace.to == "clipjax":
        pretrained.folded().save(namespace.out)
        print(f"{namespace.out}: clipjax model folder")
        return 0
    family = export_weights(pretrained, namespace.out, namespace.to)
    print(f"{namespace.out}: {family.name}")
    return 0
