"""Evaluators: retrieval, zero-shot classification, and the role for one's own."""

from clipjax.evals.base import Evaluator, Every, Runner, build_runners
from clipjax.evals.captioning import Captioning, CaptioningRunner
from clipjax.evals.retrieval import Retrieval, RetrievalRunner
from clipjax.evals.zeroshot import ZeroShot

__all__ = [
    "Captioning",
    "CaptioningRunner",
    "Evaluator",
    "Every",
    "Retrieval",
    "RetrievalRunner",
    "Runner",
    "ZeroShot",
    "build_runners",
]
