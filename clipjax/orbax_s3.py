"""Orbax on S3: TensorStore has the driver, Orbax' builder of its specifications knows files and Google's buckets only.

Two of its functions are put in place of its own; `tests/stores` holds that they are still where they were.
"""

from __future__ import annotations

import os
from typing import Any

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


def teach() -> None:
    """Lets Orbax read and write `s3://`. Once is enough; again does nothing."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    if getattr(tensorstore_utils, "clipjax_s3", False):
        return
    normalize, gcs = tensorstore_utils._normalize_path, gcs_utils.get_kvstore_for_gcs

    def kvstore(path: str) -> dict[str, Any]:
        return driver(path) if path.startswith("s3://") else gcs(path)

    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils.clipjax_s3 = True


def driver(path: str) -> dict[str, Any]:
    """TensorStore's specification of a place in a bucket; the variables that other S3 clients read count here too."""
    bucket, _, rest = path.removeprefix("s3://").partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": rest}
    if os.environ.get(
        "AWS_ACCESS_KEY_ID"
    ):  # else it looks for files first, and complains where there are none
        found["aws_credentials"] = {"type": "environment"}
    for key, names in (("endpoint", ENDPOINTS), ("aws_region", REGIONS)):
        if value := next((os.environ[name] for name in names if os.environ.get(name)), None):
            found[key] = value
    return found
