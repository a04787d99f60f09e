"""The twemoji data set, built once per test session, also when several workers run the tests."""

import fcntl
import os

import pytest


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A TFDS data_dir that holds twemoji."""
    from clipjax.data import twemoji

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # what the workers of one session share
    data_dir = base / "tfds"
    data_dir.mkdir(exist_ok=True)
    with open(base / "tfds.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        twemoji.prepare(data_dir)
    return str(data_dir)
