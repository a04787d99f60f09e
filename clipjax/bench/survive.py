"""`clipjax bench survive`: one run killed and stopped at random moments, compared bit by bit with one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipjax.component import Component
from clipjax.errors import EXIT_STALLED, ClipjaxError, RunFailed
from clipjax.processes import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from clipjax.config import Run

import numpy as np

from clipjax.data.sources import Source
from clipjax.train.watchdog import ANSWER, MEETING_PLACE, PARTING

CONFIG = "from clipjax.bench.survive import small_run\n\ndef config():\n    return small_run()\n"


@dataclasses.dataclass(frozen=True)
class Halves(Source):
    """Pictures of which one half has a color, with captions that say which."""

    records: int = 64
    """How many."""

    def open(self):
        rng = np.random.default_rng(0)
        colors = {
            "red": (255, 0, 0),
            "green": (0, 255, 0),
            "blue": (0, 0, 255),
            "white": (255,) * 3,
        }
        places: dict[str, Any] = {
            "left": np.s_[:, :8],
            "right": np.s_[:, 8:],
            "top": np.s_[:8],
            "bottom": np.s_[8:],
        }
        kinds = [(color, place) for color in colors for place in places]
        records = []
        for i in range(self.records):
            color, place = kinds[i % len(kinds)]
            image = rng.integers(0, 60, (16, 16, 3), np.uint8)
            image[places[place]] = colors[color]
            captions = (f"{color} on the {place}",)
            records.append(
                {"image": image, "captions": captions, "id": i, "key": f"{color}-{place}-{i}"}
            )
        return records


@dataclasses.dataclass(frozen=True)
class SurviveBench(Component):
    """SIGKILLs a run of several processes at random moments, starts the same command again, and compares."""

    kills: int = 50
    """How many times."""
    stops: int = 0
    """How many times, after these, one process is stopped in a step (SIGSTOP): the others must say in time which one,
    and end with the watchdog's code."""
    stall_minutes: float = 0.5
    """The watchdog's limit in the starts that `stops` takes."""
    processes: int = 2
    """Processes of the run, on this host."""
    devices: int = 2
    """Simulated devices of each."""
    seed: int = 0
    """Decides the moments."""
    workdir: str | None = None
    """Where the two runs go; None: a temporary folder, removed at the end."""
    json: bool = False
    """End with one JSON object on the last line."""

    def __post_init__(self) -> None:
        for name in ("kills", "processes", "devices"):
            if getattr(self, name) < (0 if name == "kills" and self.stops > 0 else 1):
                raise ClipjaxError(f"bench survive: {name}={getattr(self, name)} must be positive")
        if self.stops and self.processes < 2:
            raise ClipjaxError(f"bench survive: stops={self.stops} takes processes=2 at least")

    def run(self) -> dict[str, Any]:
        """Kills, compares, prints and returns what the JSON object holds.

        Raises:
          RunFailed: the two runs differ, or a process that was stopped was not named.
        """
        folder = Path(self.workdir or tempfile.mkdtemp(prefix="clipjax-survive-"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            results = self._compare(folder)
        finally:
            if self.workdir is None:
                shutil.rmtree(folder, ignore_errors=True)
        print(
            f"{results['kills']} kills, {results['stops']} stops ({results['named']} named in time), "
            f"{results['starts']} starts, {results['steps']} steps, "
            f"{results['steps_done_again']} done again, {results['beyond_the_last_save']} lost beyond the last "
            f"save; {results['different']} of {results['figures']} figures differ "
            f"({results['seconds']:.0f} s)"
        )
        if self.json:
            print(json.dumps(results))
        if results["different"] or results["beyond_the_last_save"]:
            raise RunFailed("a run that was killed does not end as one that was not")
        if results["named"] < results["stops"]:
            raise RunFailed("a process that stood still was not named in time by all others")
        return results

    def _compare(self, folder: Path) -> dict[str, Any]:
        began = time.monotonic()
        config = folder / "survive_config.py"
        config.write_text(CONFIG)
        steps = 12 + 8 * (self.kills + self.stops)
        whole = _Group(self, config, folder / "whole", steps)
        whole.start()
        whole.end()
        killed = _Group(self, config, folder / "killed", steps)
        rng = random.Random(self.seed)
        kills = stops = named = again = beyond = 0
        while kills < self.kills or stops < self.stops:
            before, saved, starts = killed.last_step(), killed.saved(), len(killed.attempts())
            killed.start(self.stall_minutes if kills == self.kills else None)
            # Some of the times anywhere in the start, else some steps further, in the middle of one or of a save.
            if kills < self.kills and rng.random() < 0.3:
                _sleep_while(killed, rng.uniform(0.0, 12.0))
            else:
                more = rng.randint(1, 12)
                killed.wait_for(lambda goal=before + more: killed.last_step() >= goal)
                _sleep_while(killed, rng.uniform(0.0, 0.3))
            if not killed.alive():
                break  # it has come to its end
            if kills < self.kills:
                killed.kill(rng)
                kills += 1
            else:
                named += killed.stop(rng.randrange(self.processes))
                stops += 1
            again += max(killed.last_step() - killed.saved(), 0)
            # It went on from the newest checkpoint there was, if it came so far as to say so.
            beyond += sum(saved - attempt["step"] for attempt in killed.attempts()[starts:])
        killed.start()
        killed.end()
        attempts = killed.attempts()
        expected, got = whole.figures(), killed.figures()
        different = sum(got.get(key) != value for key, value in expected.items())
        return {
            "kills": kills,
            "stops": stops,
            "named": named,
            "starts": len(attempts),
            "steps": steps,
            "steps_done_again": again,
            "beyond_the_last_save": beyond,
            "figures": len(expected),
            "different": different + len(got.keys() - expected.keys()),
            "seconds": round(time.monotonic() - began, 1),
        }


def small_run() -> Run:
    """A run that starts in seconds: colored halves and their names; saves, evaluations and milestones in between."""
    from clipjax import Checkpointing, Run
    from clipjax.data import BPE, Data, Shift
    from clipjax.evals import Every, Retrieval
    from clipjax.models import DualEncoder
    from clipjax.objectives import Softmax
    from clipjax.optim import AdamW, Duration, Ema
    from clipjax.towers import TextTransformer, ViT

    shape: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
    return Run(
        model=DualEncoder(
            image=ViT(image_size=16, patch_size=8, pool="mean", dropout=0.1, **shape),
            text=TextTransformer(vocab_size=300, context_length=8, eos_id=2, **shape),
            embed_dim=16,
        ),
        objective=Softmax(),
        data=Data(
            Halves(),
            BPE(vocab_size=300),
            image_size=16,
            batch_size=16,
            context_length=8,
            augment=(Shift(2),),
        ),
        optimizer=AdamW(lr=1e-3),
        duration=Duration(100),
        evals=(Retrieval(source=Halves(16), every=Every(7)),),
        ema=Ema(0.9),
        checkpoint=Checkpointing(
            every=Every(3),
            milestones=Every(25),
            best="retrieval/image_to_text/mean_reciprocal_rank",
        ),
        trackers=(),
        log_every=Every(1),
        stall_minutes=5.0,
    )


class _Group:
    """The processes of one run."""

    def __init__(self, bench: SurviveBench, config: Path, workdir: Path, steps: int):
        self._bench, self._config, self._workdir, self._steps = bench, config, workdir, steps
        self._processes: list[subprocess.Popen] = []

    def start(self, stall_minutes: float | None = None) -> None:
        """Starts them, as a launcher would; `stall_minutes`: other than the run's own."""
        count = self._bench.processes
        flags = re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
        )
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={self._bench.devices}",
        }
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
            }
        command = [sys.executable, "-m", "clipjax.cli", "train", str(self._config), "--workdir",
                   str(self._workdir), "--duration.amount", str(self._steps)]  # fmt: skip
        if stall_minutes is not None:
            command += ["--stall_minutes", str(stall_minutes)]
            # jax's own notice, which names nobody's place in the program, comes after the watchdog's.
            environment[HEARTBEAT_SECONDS] = str(round(60 * 4.5 * stall_minutes) + 120)
        errors = (self._workdir.parent / f"{self._workdir.name}.log").open("ab")
        self._processes = [
            subprocess.Popen(
                command,
                env=environment | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            for index in range(count)
        ]
        errors.close()

    def alive(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self._processes)

    def end(self) -> None:
        """Waits for the end of the run.

        Raises:
          RunFailed: it ended otherwise.
        """
        for process in self._processes:
            if code := process.wait():
                self.kill(random.Random(0))
                raise RunFailed(f"{self._workdir} ended with code {code}:\n{self._words()}")

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to one, and to the others a moment later."""
        order = list(self._processes)
        rng.shuffle(order)
        for process in order:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                time.sleep(rng.uniform(0.0, 0.2))
        for process in order:
            process.wait()

    def stop(self, index: int) -> bool:
        """SIGSTOP to one; whether all others name it in time and end with the watchdog's code."""
        log = self._workdir.parent / f"{self._workdir.name}.log"
        said = log.stat().st_size
        self._processes[index].send_signal(signal.SIGSTOP)
        others = [p for i, p in enumerate(self._processes) if i != index]
        # The limit, four times in an evaluation or save, and then what it takes to listen to the others
        # (train/watchdog.py).
        end = time.monotonic() + 60 * self._bench.stall_minutes * 4.5 + 2 * ANSWER + PARTING
        while any(p.poll() is None for p in others) and time.monotonic() < end:
            time.sleep(0.1)
        codes = [p.poll() for p in others]
        for process in self._processes:
            process.kill()
            process.wait()
        with log.open(errors="replace") as file:
            file.seek(said)
            words = file.read()
        silent = re.findall(r"process (\d+) on \S+ is silent", words)
        if index:  # this one and no other, by each of the others
            named = silent == [str(index)] * len(others)
        else:
            named = not silent and words.count(MEETING_PLACE) == len(others)
        if not named or codes != [EXIT_STALLED] * len(others):
            print(
                f"process {index} was stopped: codes {codes}, silent {silent}:\n{words[-3000:]}",
                file=sys.stderr,
            )
        return named and codes == [EXIT_STALLED] * len(others)

    def wait_for(self, condition: Any) -> None:
        """Until it holds, or one of the processes ends."""
        while self.alive() and not condition():
            time.sleep(0.02)

    def last_step(self) -> int:
        """The last step in `metrics.jsonl`, 0 without one."""
        try:
            with (self._workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 8192, 0))
                tail = file.read()
        except FileNotFoundError:
            return 0
        # A line may be half written, and the first one here cut.
        steps = re.findall(rb'^\{"step": (\d+), .*\}$', tail, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def saved(self) -> int:
        """The newest complete checkpoint, 0 without one."""
        from clipjax.checkpoint import latest_step

        return latest_step(self._workdir) or 0

    def attempts(self) -> list[dict[str, Any]]:
        """The starts that came so far as to write themselves down."""
        from clipjax.tracking.goodput import read_attempts

        return read_attempts(self._workdir)

    def figures(self) -> dict[tuple[int, str], float]:
        """(step, name) -> figure, without those that are times."""
        timed = re.compile(
            r"^(seconds/|time$|restarts$|skipped|step_seconds|.*_per_|data_share|memory|mfu|tflops)"
        )
        return {
            (line["step"], name): value
            for line in self._lines()
            for name, value in line.items()
            if name != "step" and not timed.match(name)
        }

    def _lines(self) -> list[dict[str, Any]]:
        from clipjax.tracking import read_metrics

        return read_metrics(self._workdir / "metrics.jsonl")

    def _words(self) -> str:
        text = (self._workdir.parent / f"{self._workdir.name}.log").read_text(errors="replace")
        return text[-2000:]


def _sleep_while(group: _Group, seconds: float) -> None:
    end = time.monotonic() + seconds
    while group.alive() and time.monotonic() < end:
        time.sleep(0.005)
