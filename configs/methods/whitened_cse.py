"""The recipe with embeddings whitened in shuffled groups of six channels (clipjax/methods/whitened_cse.py)."""

import dataclasses
from pathlib import Path

from clipjax import Run, load_config
from clipjax.methods.whitened_cse import Whitened


def config() -> Run:
    run = load_config(Path(__file__).with_name("recipe.py"))
    return dataclasses.replace(run, objective=Whitened(channels=6))
