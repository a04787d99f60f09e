"""A run's figures: where they are written, and what a person sees while it runs."""

from clipjax.tracking.progress import Progress, headline, print_results
from clipjax.tracking.writers import (
    MetricsLog,
    TensorBoard,
    Tracker,
    Tracking,
    Wandb,
    Writer,
    read_metrics,
)

__all__ = [
    "MetricsLog",
    "Progress",
    "TensorBoard",
    "Tracker",
    "Tracking",
    "Wandb",
    "Writer",
    "headline",
    "print_results",
    "read_metrics",
]
