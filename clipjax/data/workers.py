"""Processes that make batches, for pictures so small or machines so large that one interpreter is in the way.

A worker makes the rows of a batch that one more process of the run would: worker w of W of process p of n
is process p * W + w of n * W. So batches are the same with any number of workers, and there is no state to
resume beside the step. (Grain's worker processes keep a position each, which another number cannot take over.)

Rows come through memory that both map. Workers live until the pipe to them is closed, whatever becomes of the
process that started them, and leave signals to it: it may want to finish a step first.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax.component import Component
from clipjax.errors import RunFailed

if TYPE_CHECKING:
    from clipjax.data.fields import Spec
    from clipjax.data.loader import Data
    from clipjax.data.sources import UnreadableRecord
    from clipjax.data.tokenizers import TokenizerModel

Rows = dict[str, np.ndarray]

ALIGNED = 64
"""Bytes at whose multiples arrays begin in shared memory."""
PATIENCE = 5.0
"""Seconds that a worker has to end by itself."""


def made_by_workers(
    data: Data,
    tokenizer: TokenizerModel,
    seed: int,
    process_index: int,
    process_count: int,
    start_step: int,
    shift: int,
) -> Generator[tuple[Rows, list[UnreadableRecord]]]:
    """(A process's rows of a batch, why records in it were replaced), from `start_step` on, without end.

    Args:
      data: with `num_workers`.
      tokenizer: of the loader.
      seed: of the loader.
      process_index: of the loader.
      process_count: of the loader.
      start_step: the first batch.
      shift: as in `Loader.iterate`.

    Raises:
      RunFailed: a worker is gone. What a worker raises is raised here, at the batch it belongs to.
    """
    count = data.num_workers
    rows = data.batch_size // process_count
    spec = data.spec()
    own = dataclasses.replace(data, num_workers=0, num_threads=data.num_threads or 1)
    arguments = [
        (own, tokenizer, seed, process_index * count + w, process_count * count, start_step, shift)
        for w in range(count)
    ]
    part = rows // count
    workers = [_Worker(argument, Slots(spec, part, data.prefetch + 2)) for argument in arguments]
    try:
        while True:
            batch = {k: np.empty((rows, *s.shape), s.dtype) for k, s in spec.items()}
            failures: list[UnreadableRecord] = []
            for w, worker in enumerate(workers):
                place = slice(w * part, (w + 1) * part)
                failures += worker.take({key: array[place] for key, array in batch.items()})
            yield batch, failures
    finally:
        for worker in workers:
            worker.let_go()
        for worker in workers:
            worker.close()


class Slots:
    """Memory that processes share: places for parts of a few batches."""

    def __init__(self, spec: dict[str, Spec], rows: int, count: int):
        self._spec, self._rows, self.count = spec, rows, count
        self._offsets, self._size = [], 0
        for array in spec.values():
            self._offsets.append(self._size)
            size = rows * math.prod(array.shape) * np.dtype(array.dtype).itemsize
            self._size += -(-size // ALIGNED) * ALIGNED
        # A file without a name: nothing is left of it when the last process is gone.
        context = multiprocessing.get_context("spawn")
        self._memory = context.RawArray(ctypes.c_uint8, max(self._size, 1) * count)

    def __getitem__(self, slot: int) -> Rows:
        """The arrays of one place, [rows, ...] each."""
        buffer: Any = self._memory
        return {
            key: np.ndarray(
                (self._rows, *array.shape), array.dtype, buffer, slot * self._size + offset
            )
            for (key, array), offset in zip(self._spec.items(), self._offsets, strict=True)
        }


class _Worker:
    """A worker, as seen by the process that started it."""

    def __init__(self, arguments: tuple, slots: Slots):
        # Spawned: a process that has started threads, as JAX does, must not be forked.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._slots = slots
        self._process = context.Process(
            target=_work,
            args=(modules_of(arguments[0]), pickle.dumps(arguments), slots, theirs),
            name="clipjax-data",
        )
        self._process.start()
        theirs.close()
        # Also where the iterator is left open when Python ends, which waits for its processes.
        self._ending = multiprocessing.util.Finalize(
            self, _end, (self._pipe, self._process), exitpriority=10
        )

    def take(self, rows: Rows) -> list[UnreadableRecord]:
        """Copies the next part into `rows`; returns why records in it were replaced."""
        try:
            slot, failures = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(PATIENCE)
            code = self._process.exitcode
            raise RunFailed(
                "a process that makes batches is gone "
                + ("(killed: too little memory?)" if code == -9 else f"(exit code {code})")
                + "; lower num_workers, or see above for what it said"
            ) from error
        if slot is None:
            raise failures
        for key, array in self._slots[slot].items():
            rows[key][:] = array
        with contextlib.suppress(OSError):  # gone: the next `take` will say so
            self._pipe.send(slot)
        return failures

    def let_go(self) -> None:
        """Says that no more is wanted."""
        self._pipe.close()

    def close(self) -> None:
        """Waits for its end, or makes one."""
        self._ending()


def _end(pipe: Any, process: Any) -> None:
    pipe.close()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def modules_of(data: Component) -> list[tuple[str, str]]:
    """(Name, file) of the modules that define a component and those in it, and came from a user's file."""
    found: dict[str, str] = {}
    left: list[Any] = [data]
    while left:
        value = left.pop()
        if isinstance(value, Component):
            name = type(value).__module__
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and name != "__main__" and not name.startswith("clipjax."):
                found[name] = os.path.abspath(file)
            left += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (tuple, list)):
            left += value
    return list(found.items())


def _work(modules: list[tuple[str, str]], arguments: bytes, slots: Slots, pipe: Any) -> None:
    """What a worker does: makes its part of every batch, and stops when the pipe is closed."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers share the cores out already
    logging.disable(logging.WARNING)  # said once, by the process that trains
    free = iter([*range(slots.count)])
    held: list[int] = []

    def rows_of() -> Rows:
        slot = next(free, None)
        held.append(pipe.recv() if slot is None else slot)
        return slots[held[-1]]

    try:
        for name, file in modules:
            _import(name, file)
        from clipjax.data.loader import Loader

        data, tokenizer, seed, index, count, start_step, shift = pickle.loads(arguments)
        loader = Loader(data, tokenizer, seed, index, count)
        with contextlib.closing(loader.made(start_step, shift, rows_of)) as parts:
            for _, failures in parts:
                pipe.send((held.pop(0), failures))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException as error:
        with contextlib.suppress(OSError):
            pipe.send((None, _sendable(error)))


def _import(name: str, file: str) -> None:
    """Imports a module by its name, or from a user's file under the name it had."""
    if name in sys.modules:
        return
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec(name) is not None:
            return  # unpickling imports it
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"a process that makes batches failed: {error!r}")
