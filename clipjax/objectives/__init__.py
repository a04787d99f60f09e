"""What a run minimizes: objectives, and the pair engine under them."""

from clipjax.objectives.base import Objective, Sum, Term
from clipjax.objectives.pairs import AllGather, Grouped, Hierarchical, PairEngine, Ring
from clipjax.objectives.sigmoid import Sigmoid
from clipjax.objectives.softmax import Softmax

__all__ = [
    "AllGather",
    "Grouped",
    "Hierarchical",
    "Objective",
    "PairEngine",
    "Ring",
    "Sigmoid",
    "Softmax",
    "Sum",
    "Term",
]
