"""Evaluators: retrieval, classification with and without examples, probes, and the role for one's own."""

from clipjax.evals.base import Evaluator, Every, Runner, build_runners
from clipjax.evals.captioning import Captioning, CaptioningRunner
from clipjax.evals.compositional import Compositional
from clipjax.evals.few_shot import FewShot
from clipjax.evals.figure import Figure
from clipjax.evals.geometry import Geometry
from clipjax.evals.knn import KNN
from clipjax.evals.linear_probe import LinearProbe
from clipjax.evals.retrieval import Retrieval, RetrievalRunner
from clipjax.evals.segmentation import LinearSegmentation, Segmentation
from clipjax.evals.winoground import WinoGAViL, Winoground
from clipjax.evals.zeroshot import ZeroShot, ZeroShotRunner

__all__ = [
    "KNN",
    "Captioning",
    "CaptioningRunner",
    "Compositional",
    "Evaluator",
    "Every",
    "FewShot",
    "Figure",
    "Geometry",
    "LinearProbe",
    "LinearSegmentation",
    "Retrieval",
    "RetrievalRunner",
    "Runner",
    "Segmentation",
    "WinoGAViL",
    "Winoground",
    "ZeroShot",
    "ZeroShotRunner",
    "build_runners",
]
