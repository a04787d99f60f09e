"""SogCLR and iSogCLR: a moving average and a temperature for every record, so that small batches do.

Qiu et al. 2023, "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic
Temperature Individualization" (arXiv 2305.11965), and Yuan et al. 2022, "Provable Stochastic Optimization
for Global Contrastive Learning: Small Batch Does Not Harm Performance" (arXiv 2202.12387). Status: the
authors' code (zhqiu/contrastive-learning-iSogCLR) read.

With D_ij = x_i.y_j - x_i.y_i, each image i minimizes tau_i log E_j exp(D_ij / tau_i) + tau_i rho over the whole
data set, by a moving average s_i of the batch's mean of exp(D_ij / tau_i), kept by record. The gradient is that of
sum_j w_ij D_ij / (B - 1) with w_ij = exp(D_ij / tau_i) / s_i held fixed; texts alike; the two are added. In
iSogCLR tau_i follows, by momentum, its own gradient log s_i + rho - sum_j w_ij D_ij / tau_i / (B - 1), clipped.

What differs here: averages are kept as logarithms, which makes the code's running maximum needless; a record's
first visit takes the batch's mean as its average instead of averaging it with zero (`begin_at_zero` does as the
code does); a record that stands twice in a batch keeps its last row. The loss is a surrogate: watch
`sogclr/value`, the mean of tau log s + tau rho. The model's own scale is not used, and so not trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.batch import field
from clipjax.errors import ClipjaxError
from clipjax.methods.registry import Method
from clipjax.objectives import Pairwise, Table
from clipjax.objectives.pairs import Expectation, LogSumExp

METHOD = Method(
    id="isogclr",
    title="Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic "
    "Temperature Individualization",
    arxiv="2305.11965",
    status="official",
    summary="moving averages and temperatures by record, for small batches (and SogCLR)",
)


@dataclasses.dataclass(frozen=True)
class SogCLR(Pairwise):
    """The global contrastive loss with one temperature: averages are kept for each record."""

    gamma: float = 0.8
    """Share of the present batch in a record's average; 1 forgets all earlier ones."""
    temperature: float = 0.07
    """To begin with; of SogCLR, for good."""
    begin_at_zero: bool = False
    """Average the first visit with zero, as the authors' code does."""

    def __post_init__(self):
        if not 0 < self.gamma <= 1:
            raise ClipjaxError(f"{type(self).__name__}: gamma={self.gamma} must lie in (0, 1]")
        if self.temperature <= 0:
            raise ClipjaxError(
                f"{type(self).__name__}: temperature={self.temperature} must be above 0"
            )

    def init_state(self, setting):
        begin = {"average": -jnp.inf} | self.begin()
        return {side: Table().init(setting, **begin) for side in (self.first, self.second)}

    def begin(self) -> dict[str, float]:
        """Columns of a record besides its average, with the value to begin with."""
        return {}

    def prepare(self, state, context):
        sample = field(context.batch, "sample", type(self).__name__)
        kept = {side: Table().read(context.engine, state[side], sample) for side in state}
        return dataclasses.replace(context.aux, rows=kept)

    def __call__(self, encoded, context):
        engine, first, second = context.engine, encoded[self.first], encoded[self.second]
        kept = context.aux.rows
        own = jnp.sum(first * second, -1)
        tau = {side: kept[side].get("temperature", self.temperature) + 0 * own for side in kept}

        def tile(row, col, shared):
            cosine = engine.dot(row["unit"], col["unit"])

            def terms(difference, tau):
                logits = jax.lax.stop_gradient(difference / tau)
                return {
                    "log_sum": LogSumExp(logits),
                    "mean": Expectation(logits, difference),
                }

            return (
                terms(cosine - row["own"][:, None], row["tau"][:, None]),
                terms(cosine - col["own"], col["tau"]),
            )

        rows, cols = engine.reduce(
            tile,
            {"unit": first, "own": own, "tau": tau[self.first]},
            {"unit": second, "own": own, "tau": tau[self.second]},
        )
        loss = value = jnp.zeros((), jnp.float32)
        results = {}
        for side, seen in ((self.first, rows), (self.second, cols)):
            others = len(own) // engine.blocks - 1
            now = seen["log_sum"] - jnp.log(others)
            average = self._averaged(kept[side]["average"], now)
            weighted = jnp.exp(jax.lax.stop_gradient(now - average)) * seen["mean"]
            loss += jnp.mean(weighted)
            slope = average + self.rho - weighted / tau[side]
            results[side] = {"average": average} | self.step(kept[side], slope)
            value += jnp.mean(tau[side] * (average + self.rho))
        metrics = {"sogclr/value": value, "sogclr/temperature": jnp.mean(tau[self.first])}
        return loss, metrics, jax.lax.stop_gradient(results)

    def advance(self, state, results, context):
        sample, table = context.batch["sample"], Table()
        return {
            side: table.write(context.engine, state[side], sample, **results[side])
            for side in state
        }

    @property
    def rho(self) -> float:
        """What every unit of temperature costs."""
        return 0.0

    def step(self, kept: dict[str, jax.Array], slope: jax.Array) -> dict[str, jax.Array]:
        """A record's other columns after the step, given the slope of its objective in tau."""
        return {}

    def _averaged(self, average, now):
        """log((1 - gamma) exp(average) + gamma exp(now)), no gradient."""
        average, now = jax.lax.stop_gradient((average, now))
        mixed = (
            now
            if self.gamma == 1
            else jnp.logaddexp(average + jnp.log1p(-self.gamma), now + jnp.log(self.gamma))
        )
        return mixed if self.begin_at_zero else jnp.where(average == -jnp.inf, now, mixed)


@dataclasses.dataclass(frozen=True)
class ISogCLR(SogCLR):
    """SogCLR with a temperature for each record and side, which learns."""

    temperature: float = 0.01
    """Every record's, to begin with."""
    cost: float = 8.0
    """rho: what every unit of temperature costs; the larger, the lower the temperatures."""
    rate: float = 0.001
    """Step size of temperatures."""
    momentum: float = 0.9
    """Share of the newest gradient in a temperature's momentum."""
    least: float = 0.005
    """Temperatures stay above this."""
    greatest: float = 1.0
    """And below this."""

    def begin(self):
        return {"temperature": self.temperature, "slope": 0.0}

    @property
    def rho(self):
        return self.cost

    def step(self, kept, slope):
        slope = jnp.clip(slope, -5, 5)
        slope = (1 - self.momentum) * kept["slope"] + self.momentum * slope
        tau = jnp.clip(kept["temperature"] - self.rate * slope, self.least, self.greatest)
        return {"temperature": tau, "slope": slope}
