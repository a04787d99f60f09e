"""clipjax: large-batch image-text pretraining in JAX.

The names below are imported when first used, so that `import clipjax` is instant.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Run": "clipjax.config",
    "load_config": "clipjax.config",
    "load": "clipjax.restore",
    "open_run": "clipjax.restore",
    "open_pretrained": "clipjax.restore",
    "Pretrained": "clipjax.pretrained",
    "StartFrom": "clipjax.start",
    "Average": "clipjax.start",
    "Together": "clipjax.start",
    "Component": "clipjax.component",
    "ClipjaxError": "clipjax.errors",
    "Predictor": "clipjax.predictor",
    "MeshShape": "clipjax.mesh",
    "Sharding": "clipjax.sharding",
    "Rule": "clipjax.sharding",
    "Checkpointing": "clipjax.checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipjax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
