"""`clipjax.<name>` is what it says, whatever has been imported before."""

import importlib
import pkgutil

import clipjax


def test_no_public_name_is_also_a_module():
    """Importing a submodule sets the package's attribute of that name, and would hide the public one."""
    modules = {module.name for module in pkgutil.iter_modules(clipjax.__path__)}
    assert not modules & set(clipjax.__all__)


def test_every_public_name_is_there():
    for name in clipjax.__all__:
        value = getattr(clipjax, name)
        assert value.__module__.startswith("clipjax.")
        assert getattr(importlib.import_module(value.__module__), name) is value
