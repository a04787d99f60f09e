"""Lets open_clip and timm be imported where no torchvision fits the torch there is.

Neither the goldens nor the round trip use anything of torchvision: models are built without
pretrained weights, and pictures are brought to size with Pillow, which torchvision calls too.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock


class _Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name) if name[0].islower() else _Names(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.0"


def install():
    """Call before importing open_clip; imports transformers first, which must not see the stub."""
    import transformers.models.clip.modeling_clip
    import transformers.models.siglip.modeling_siglip
    import transformers.models.siglip2.modeling_siglip2  # noqa: F401

    sys.meta_path.insert(0, _Finder())
