"""Steps out of proportion: which are skipped, what that leaves, and going back."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clipjax.errors import ClipjaxError
from clipjax.optim import SpikeGuard
from clipjax.params import paths


def test_which_steps_are_spikes():
    """In NumPy: above 3 medians of the norm, or 4 robust deviations above the median of the loss."""
    rng = np.random.default_rng(3)
    losses = rng.normal(2.0, 0.1, 60).astype(np.float32)
    norms = np.exp(rng.normal(0.0, 0.2, 60)).astype(np.float32)
    losses[[3, 20, 41]] += 5.0
    norms[[30, 42]] *= 20.0
    losses[50], norms[51] = np.nan, np.inf
    guard = SpikeGuard(window=16, least=8, norm_factor=3.0, loss_deviations=4.0)
    state, got, expected = guard.init(), [], []
    seen_losses, seen_norms = [], []
    for loss, norm in zip(losses, norms, strict=True):
        spike, state = guard.check(state, jnp.asarray(loss), jnp.asarray(norm))
        got.append(bool(spike))
        finite = np.isfinite(loss) and np.isfinite(norm)
        last_losses, last_norms = seen_losses[-16:], seen_norms[-16:]
        high = False
        if finite and len(seen_losses) >= 8:
            middle = np.median(last_losses)
            spread = max(1.4826 * np.median(np.abs(last_losses - middle)), 1e-3 * abs(middle))
            high = loss > middle + 4 * spread or norm > 3 * np.median(last_norms)
        expected.append(bool(high))
        if finite:
            seen_losses.append(loss)
            seen_norms.append(norm)
    assert got == expected
    assert [i for i, spike in enumerate(got) if spike and i in (20, 30, 41, 42)] == [20, 30, 41, 42]
    assert not got[3]  # too early to tell
    assert int(state["spikes"]) == sum(expected)


def test_settings_that_make_no_sense():
    for bad in ({"least": 0}, {"least": 200}, {"norm_factor": 1.0}, {"loss_deviations": 0.0}):
        with pytest.raises(ClipjaxError, match="spikes"):
            SpikeGuard(**bad)


SPIKY = """
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Spiky(Softmax):
    def __call__(self, encoded, context):
        loss, metrics = super().__call__(encoded, context)
        high = (context.step >= 6) & (context.step < 9)
        return loss * jnp.where(high, 100.0, 1.0), metrics
"""


def test_a_run_goes_back_after_a_row_of_spikes_and_on_with_other_data(
    clipjax, vary, read_metrics, capfd, caplog
):
    """Steps 7 to 9 have a hundred times the loss: they change nothing; the third in a row sends the weights back."""
    config = vary(
        "objective=Spiky(), evals=(), duration=Duration(12), max_bad_steps=3, checkpoint=Checkpointing("
        "every=Every(3), keep=9), spikes=SpikeGuard(window=8, least=4)"
    )
    config.write_text(config.read_text() + SPIKY)
    assert clipjax("train", config=config) == 1
    assert (
        "3 steps in a row up to step 9 had a loss or gradient out of proportion"
        in capfd.readouterr().err
    )
    again = clipjax.workdir.with_name("again")
    assert clipjax("train", "--spikes.rollback", config=config, workdir=again) == 0
    assert "Going back to the weights of step 6" in caplog.text

    def state(step):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.restore(again / f"checkpoints/{step}/state")
        return {name: np.asarray(leaf) for name, leaf in paths(saved)}

    assert read_metrics(again, "spikes")[12] == 3
    back = min(int(p.name) for p in (again / "checkpoints").iterdir() if int(p.name) > 9)
    old, new = state(6), state(back)
    same = [n for n in old if n.startswith(("params/", "opt_state/"))]
    assert all(np.array_equal(old[n], new[n]) for n in same)
    assert (new["step"], new["bad_steps"], new["bad_streak"]) == (back, back - 6, 0)
    assert state(12)["opt_state/lr/count"] == 6 + 12 - back
