"""What a run minimizes: objectives, and the pair engine under them."""

from clipjax.objectives.base import (
    Aux,
    Chosen,
    Context,
    Objective,
    Pairwise,
    PerExample,
    Setting,
    SpecialTokens,
    Sum,
    Term,
)
from clipjax.objectives.caption import Caption
from clipjax.objectives.decoupled import Decoupled
from clipjax.objectives.diagnostics import Diagnostics
from clipjax.objectives.eisl import EISL
from clipjax.objectives.matching import Matching
from clipjax.objectives.memory import Queue, Table
from clipjax.objectives.multi_positive import DecoupledSoftmax, MultiPositive
from clipjax.objectives.pairs import AllGather, Auto, Grouped, Hierarchical, PairEngine, Ring
from clipjax.objectives.ramp import Ramp
from clipjax.objectives.sigmoid import Sigmoid
from clipjax.objectives.soft_target import SoftTarget
from clipjax.objectives.softmax import Softmax
from clipjax.objectives.teachers import Frozen, Itself, MovingAverage, Teacher
from clipjax.objectives.weighted import Weighted

__all__ = [
    "EISL",
    "AllGather",
    "Auto",
    "Aux",
    "Caption",
    "Chosen",
    "Context",
    "Decoupled",
    "DecoupledSoftmax",
    "Diagnostics",
    "Frozen",
    "Grouped",
    "Hierarchical",
    "Itself",
    "Matching",
    "MovingAverage",
    "MultiPositive",
    "Objective",
    "PairEngine",
    "Pairwise",
    "PerExample",
    "Queue",
    "Ramp",
    "Ring",
    "Setting",
    "Sigmoid",
    "SoftTarget",
    "Softmax",
    "SpecialTokens",
    "Sum",
    "Table",
    "Teacher",
    "Term",
    "Weighted",
]
