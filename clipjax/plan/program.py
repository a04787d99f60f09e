"""Processes of their own that know one machine's devices: a question as JSON in, an answer as JSON out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from clipjax.component import from_json, to_json
from clipjax.config import Run, load_module
from clipjax.errors import ClipjaxError
from clipjax.plan.machines import Machine, machine
from clipjax.plan.target import environment


class TooLong(ClipjaxError):
    """A step that had not compiled when its time was over."""


def compiled_for(
    run: Run, on: Machine, files: list[Path], examples: int | None, seconds: float | None = None
) -> dict[str, Any]:
    """Compiles the run's step for a machine, in a process of its own.

    Args:
      run: what to train.
      on: where.
      files: the user's Python files that the run's components come from.
      examples: in one epoch; None: unknown.
      seconds: after which the process is ended; None: never.

    Returns:
      devices, shards (of the batch), state and state_total (bytes on one device and in all, by part of the
      train state), on_host (bytes of one device's state that wait in the host's memory), checkpoint (bytes of a
      whole one), batch (bytes on one device), waiting (of batches that are there before their step). Of one
      device and the compiler's: temporary, arguments, returned (bytes of results beside the donated state),
      aliased (the donated state), sent (bytes by kind of collective, on rings), network (of these, what leaves
      the island of fast links). temporary_parts (bytes by kind, arithmetic), flops (matrix products of all
      devices), forward (those of one pass over the batch),
      layout (a line on what is split), whole (path and bytes of the largest arrays that are not), arrays (of
      the program, the largest first, such as f32[256,512]), seconds (to trace and compile), from ("compiler").

    Raises:
      ClipjaxError: the run does not fit the machine, or its compiler is not there; `TooLong`: time was over.
    """
    return _ask("compile", run, on, files, examples, seconds)


def checked_on_cpus(
    run: Run, on: Machine, files: list[Path], examples: int | None
) -> dict[str, Any]:
    """`compiled_for` simulated CPU devices, and then two steps for real, on zeros.

    Returns:
      as `compiled_for`, measured (bytes by which the process grew at most, of all devices together, once the
      program had run before) and stays (by which it had grown by then, all arrays freed: the program itself).
    """
    return _ask("check", run, on, files, examples, None)


def traced_for(
    run: Run, on: Machine, files: list[Path], examples: int | None, variants: list[str]
) -> dict[str, Any]:
    """What `clipjax.plan.search` needs of a run before anything is compiled.

    Args:
      variants: values of the towers' `remat`.

    Returns:
      what `clipjax.plan.search.facts` returns.
    """
    return _ask("trace", run, on, files, examples, None, variants=variants)


def _ask(
    what: str, run: Run, on: Machine, files: list[Path], examples: int | None, seconds: float | None,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    asked = {
        "what": what,
        "run": to_json(run),
        "on": on.name,
        "files": [str(path) for path in files],
        "examples": examples,
        **others,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "clipjax.plan.program"],
            input=json.dumps(asked),
            env=environment(on, compiler=what != "trace"),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise TooLong(f"plan: the step did not compile for {on.name} in {seconds:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ClipjaxError(
            f"plan: the step did not compile for {on.name}:\n{done.stderr[-2000:].strip()}"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ClipjaxError(answer["error"])
    return answer


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    from clipjax.plan import check, search, step

    for path in asked["files"]:
        load_module(Path(path))
    run, on, examples = from_json(asked["run"]), machine(asked["on"]), asked["examples"]
    if asked["what"] == "trace":
        return search.facts(run, on, examples, asked["variants"])
    if asked["what"] == "check":
        return check.measure(run, on, examples)
    return step.measure(run, on, examples)


def _main() -> None:
    try:
        found = _answer(json.load(sys.stdin))
    except ClipjaxError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
