"""The run's folder as one HTML file."""

from clipjax.report.build import write_report
from clipjax.report.contents import (
    CaptionExample,
    Example,
    Guess,
    Ranking,
    ScoredCaption,
    Similarities,
)
from clipjax.report.environment import environment

__all__ = [
    "CaptionExample",
    "Example",
    "Guess",
    "Ranking",
    "ScoredCaption",
    "Similarities",
    "environment",
    "write_report",
]
