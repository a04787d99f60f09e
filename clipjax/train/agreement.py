"""What all processes of a run must be of one mind about, before any of them waits for another.

A collective or a barrier of processes that differ is a hang without a word. Here they speak through the coordination
service that they joined at start-up, which knows time-outs: process 0 decides what one must decide, compares
what all must have in common, and tells every process what it found, by host.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax

import clipjax
from clipjax.component import differences
from clipjax.errors import Absent, ClipjaxError, Unavailable
from clipjax.processes import seconds_of

AGREE_SECONDS = "CLIPJAX_AGREE_SECONDS"
"""Environment variable: how long the processes wait for each other when they compare; default 600."""
FOLDER = "clipjax/agreement"
GRACE = 15.0
"""Seconds that the others wait longer than process 0, which has to tell them whom it waited for in vain."""
PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy", "pillow",
    "tokenizers", "sentencepiece",
)  # fmt: skip
T = TypeVar("T")
_meetings = itertools.count()


def decide(what: str, choose: Callable[[], T]) -> T:
    """Calls `choose` in process 0 and returns what it returns (JSON-able) in every process.

    Args:
      what: for messages, such as "the step to begin at".
      choose: a ClipjaxError that it raises is raised in every process.

    Raises:
      Absent: process 0 said nothing in time.
    """
    if jax.process_count() == 1:
        return choose()
    key, error, answer = f"{FOLDER}/{next(_meetings)}", None, None
    if jax.process_index() == 0:
        try:
            answer = choose()
        except ClipjaxError as refusal:
            error = refusal
        _say(key, {"host": _host(), "answer": answer} | _failure(error))
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]
    told = _hear(key, time.monotonic() + _patience() + GRACE)
    if told is None:
        raise Absent(f"process 0 has not said {what} in {_patience() + GRACE:.0f} s")
    if "error" in told:
        raise _kind(told["code"])(f"process 0 on {told['host']}: {told['error']}")
    return told["answer"]


@contextlib.contextmanager
def meeting(
    what: str, differ: type[ClipjaxError] = ClipjaxError
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """In which all processes prepare something, and bring what they found to compare it.

        with meeting("the set-up") as compare:
            ...
            compare({"examples": 64, "packages": {"jax": "0.10.2"}})

    What one process refuses in there is told to all of them. So is what differs, by name and host.

    Args:
      what: for messages: what they do in there.
      differ: the error that says that they differ.

    Raises:
      ClipjaxError: the processes differ, or another one refused.
      Absent: one has not come in time.
    """
    key, came = f"{FOLDER}/{next(_meetings)}", False

    def compare(facts: dict[str, Any]) -> None:
        nonlocal came
        came = True
        _meet(key, what, facts, differ.exit_code)

    try:
        yield compare if jax.process_count() > 1 else (lambda facts: None)
    except ClipjaxError as error:
        if not came and jax.process_count() > 1:
            _say(f"{key}/{jax.process_index()}", {"host": _host()} | _failure(error))
            if jax.process_index() == 0:
                text = f"process 0 on {_host()}: {error}"
                _say(f"{key}/verdict", {"error": text, "code": error.exit_code})
        raise


def _meet(key: str, what: str, facts: dict[str, Any], code: int) -> None:
    began = time.monotonic()
    _say(f"{key}/{jax.process_index()}", {"host": _host(), "facts": facts})
    if jax.process_index() == 0:
        verdict = _judge(key, what, code, began + _patience())
        _say(f"{key}/verdict", verdict)
    else:
        heard = _hear(f"{key}/verdict", began + _patience() + GRACE)
        if heard is None:
            raise Absent(
                f"process 0 has not finished {what} in {_patience() + GRACE:.0f} s ({AGREE_SECONDS} sets the time)"
            )
        verdict = heard
    if "error" in verdict:
        raise _kind(verdict["code"], verdict.get("absent", False))(verdict["error"])


def _judge(key: str, what: str, code: int, deadline: float) -> dict[str, Any]:
    """Process 0's finding: empty, or an error for all."""
    brought = [_hear(f"{key}/{i}", deadline) for i in range(jax.process_count())]
    refused = [(i, b) for i, b in enumerate(brought) if b is not None and "error" in b]
    if refused:
        index, first = refused[0]
        others = f" (and {len(refused) - 1} others)" if len(refused) > 1 else ""
        text = f"process {index} on {first['host']}{others}: {first['error']}"
        return {"error": text, "code": first["code"]}
    absent = [i for i, b in enumerate(brought) if b is None]
    if absent:
        hosts = ", ".join(
            f"process {i} on {b['host']}" for i, b in enumerate(brought) if b is not None
        )
        text = (
            f"{_processes(absent)} of {len(brought)} did not finish {what} in {_patience():.0f} s; heard of: {hosts}. "
            f"Look there; {AGREE_SECONDS} sets the time"
        )
        return {"error": text, "code": Absent.exit_code, "absent": True}
    heard = [b for b in brought if b is not None]
    differing = [
        (i, path, there, here)
        for i, b in enumerate(heard[1:], start=1)
        for path, there, here in differences(heard[0]["facts"], b["facts"])
    ]
    if not differing:
        return {}
    return {"error": _describe(differing, [b["host"] for b in heard]), "code": code}


def _describe(differing: list[tuple[int, str, Any, Any]], hosts: list[str]) -> str:
    by_fact: dict[tuple[str, str], list[int]] = {}
    first = {path: value for _, path, value, _ in differing}
    for index, path, _, value in differing:
        by_fact.setdefault((path, _short(value)), []).append(index)
    lines = []
    for (path, value), who in list(by_fact.items())[:8]:
        places = ", ".join(dict.fromkeys(hosts[i] for i in who[:4])) + (
            "..." if len(who) > 4 else ""
        )
        there = f"{_short(first[path])} in process 0 on {hosts[0]}"
        lines.append(f"{path} is {there} and {value} in {_processes(who)} on {places}")
    more = f"; and {len(by_fact) - 8} more" if len(by_fact) > 8 else ""
    return "the processes differ: " + "; ".join(lines) + more


def surroundings(run: dict[str, Any]) -> dict[str, Any]:
    """What the processes of a run should have in common besides what it says: code, packages, Python.

    Args:
      run: the run as JSON; the files of the user's own components in it count as code.
    """
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    own = {name: _digest([Path(file)]) for name, file in _user_files(run)}
    package = Path(clipjax.__file__).parent
    return {
        "code": {"clipjax": _digest(sorted(package.rglob("*.py")))} | own,
        "packages": versions,
        "python": platform.python_version(),
    }


def _user_files(run: Any) -> list[tuple[str, str]]:
    """(module, file) of the components in a run's JSON that are not clipjax's own."""
    found: dict[str, str] = {}

    def look(part: Any) -> None:
        if isinstance(part, dict):
            module = str(part.get("@type", "clipjax:")).partition(":")[0]
            file = getattr(sys.modules.get(module), "__file__", None)
            if module.split(".")[0] != "clipjax" and file:
                found[module] = file
        for value in (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        ):
            look(value)

    look(run)
    return sorted(found.items())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + ("..." if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def _kind(code: int, absent: bool = False) -> type[ClipjaxError]:
    if absent:
        return Absent
    return Unavailable if code == Unavailable.exit_code else ClipjaxError


def _failure(error: ClipjaxError | None) -> dict[str, Any]:
    return {} if error is None else {"error": str(error), "code": error.exit_code}


def _host() -> str:
    return socket.gethostname()


def _patience() -> float:
    return seconds_of(os.environ, AGREE_SECONDS, 600)


def _say(key: str, value: dict[str, Any]) -> None:
    _client().key_value_set(key, json.dumps(value))


def _hear(key: str, deadline: float) -> dict[str, Any] | None:
    """What was said under a key; None if nobody says it in time."""
    left = int(1000 * (deadline - time.monotonic()))
    try:
        client = _client()
        said = (
            client.blocking_key_value_get(key, left) if left > 0 else client.key_value_try_get(key)
        )
        return json.loads(said)
    except jax.errors.JaxRuntimeError:  # the time is up, or process 0 is gone
        return None


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
