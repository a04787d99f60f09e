"""`clipjax average MODEL MODEL ... --out DIR [--weights 0.5,0.5]`: a weighted mean of weights."""

from __future__ import annotations

from clipjax.cli.arguments import import_files, new_parser
from clipjax.errors import ClipjaxError
from clipjax.stores import place


def main(arguments: list[str]) -> int:
    """Writes the mean as a model's folder."""
    parser = new_parser(
        "average",
        "The mean of the weights of models of one architecture, as a model's folder. Of a model before and "
        "after fine-tuning it is WiSE-FT; of several fine-tuned models, a soup.",
    )
    parser.add_argument(
        "models", nargs="+", help="runs, their checkpoints/<step>, or models' folders"
    )
    parser.add_argument("--out", type=place, required=True, help="a new folder")
    parser.add_argument(
        "--weights", help="one for each model, with commas, adding up to 1; default: all the same"
    )
    namespace = parser.parse_args(arguments)
    import_files(namespace.imports)
    from clipjax.restore import open_pretrained
    from clipjax.start import Average

    weights = _numbers(namespace.weights) if namespace.weights else ()
    Average(tuple(namespace.models), weights).open(open_pretrained).save(namespace.out)
    print(namespace.out)
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ClipjaxError(f"--weights {text}: give numbers with commas between them") from error
