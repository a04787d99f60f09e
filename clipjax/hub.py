"""Models on the Hugging Face Hub: `hf://owner/name` as a folder on disk.

    clipjax import hf://owner/name --out models/theirs
    clipjax.load("hf://owner/name@v1.0")

Of a repository, one set of weights is fetched with the files beside it that are read here, into the Hub's
own cache (`HF_HOME`); what is there already is not fetched again, and serves where the Hub cannot be reached.
The Hub's variables hold here too: `HF_TOKEN`, `HF_ENDPOINT` for another server, `HF_HUB_OFFLINE=1` for none.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipjax.errors import ClipjaxError, Unavailable, did_you_mean
from clipjax.interop.source import CONFIG_FILES, TOKENIZER_FILES, WEIGHTS_FILES, is_source
from clipjax.pretrained import MODEL_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, is_pretrained

_ADDRESS = re.compile(r"(?i:hf):/+(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?/?")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def snapshot(address: str) -> Path:
    """Fetches a model, and says where it is.

    Args:
      address: hf://owner/name, with @revision behind it for a branch, a tag or a commit.

    Raises:
      ClipjaxError: it is no such address, the client is not installed, there is no such repository or
        revision, it asks for permission, or holds nothing that is read here.
      Unavailable: the Hub cannot be reached, and the cache has no copy.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ClipjaxError(
            f"{address!r}: a model on the Hub is hf://owner/name, or hf://owner/name@revision"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ClipjaxError(
            f"{address}: the Hub is read through huggingface_hub: pip install 'clipjax[hub]'"
        )
    return _fetched(address, found["name"], found["revision"])


def _fetched(address: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    # The client reads its variables when it is imported, which may have been before this one was set.
    server = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=server).model_info(name, revision=revision)
        files = wanted(address, [sibling.rfilename for sibling in info.siblings or ()])
        # By its name, not as the commit that it is: the cache then knows the commit by that name.
        settings: dict[str, Any] = {"revision": revision, "endpoint": server}
        return Path(snapshot_download(name, allow_patterns=files, **settings))
    except hub.GatedRepoError as error:
        raise ClipjaxError(
            f"{address}: its owner asks for an agreement first: accept it on the model's page, and set "
            "HF_TOKEN to a token of that account"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ClipjaxError(f"{address}: the repository has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise ClipjaxError(
            f"{address}: there is no repository {name!r}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except hub.HFValidationError as error:
        raise ClipjaxError(f"{address}: {name!r} is no repository's name: {error}") from error
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, OSError) as error:
        return _cached(address, name, revision, error)
    except Exception as error:
        if not _is_connection(error):
            raise
        return _cached(address, name, revision, error)


def _is_connection(error: BaseException) -> bool:
    """Whether the client of the network raised it: huggingface_hub has had three of them."""
    module = type(error).__module__.split(".")[0]
    return module in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def _cached(address: str, name: str, revision: str | None, error: Exception) -> Path:
    """The copy of an earlier call, where the Hub cannot be reached."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    settings: dict[str, Any] = {"revision": revision, "local_files_only": True}
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=[MODEL_FILE, "config.json"], **settings)
        )
    except (hub.LocalEntryNotFoundError, OSError):
        folder = None
    if folder is not None and (is_source(folder) or is_pretrained(folder)):
        return folder
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise Unavailable(
        f"{address}: the Hub cannot be reached and its cache has no copy ({reason}): check the network, "
        "HF_ENDPOINT and HF_HUB_OFFLINE, or fetch the folder elsewhere and name it here"
    ) from error


def wanted(address: str, files: Sequence[str]) -> list[str]:
    """Which files of a repository are fetched: one set of weights, and what is read beside them.

    Raises:
      ClipjaxError: there are no weights under a usual name.
    """
    if MODEL_FILE in files and WEIGHTS_FILE in files:  # a folder of clipjax's own
        own = (MODEL_FILE, WEIGHTS_FILE)
        return [name for name in files if name in own or name.startswith(f"{TOKENIZER_FOLDER}/")]
    weights = next((name for name in WEIGHTS_FILES if name in files), None)
    if weights is None:
        some = ", ".join(sorted(files)[:6])
        raise ClipjaxError(
            f"{address} holds no weights under a usual name ({', '.join(WEIGHTS_FILES)}), but {some}"
            + did_you_mean(WEIGHTS_FILES[2], files)
        )
    shards = weights.endswith(".index.json")
    return [
        name
        for name in files
        if name == weights
        or name in (*CONFIG_FILES, *TOKENIZER_FILES)
        or (shards and _SHARD.fullmatch(name))
    ]
