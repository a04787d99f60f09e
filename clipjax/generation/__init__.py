"""Generation: captions token by token, by greedy, beam or contrastive search or by sampling."""

from clipjax.generation.beam import Beam
from clipjax.generation.contrastive import ContrastiveSearch
from clipjax.generation.decoder import Captioner
from clipjax.generation.generate import generate
from clipjax.generation.greedy import Greedy
from clipjax.generation.sample import Sample
from clipjax.generation.strategy import Generated, SpecialTokens, Strategy

__all__ = [
    "Beam",
    "Captioner",
    "ContrastiveSearch",
    "Generated",
    "Greedy",
    "Sample",
    "SpecialTokens",
    "Strategy",
    "generate",
]
