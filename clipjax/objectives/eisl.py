"""EISL: a caption loss that forgives words in other places, for noisy captions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipjax.errors import ClipjaxError
from clipjax.objectives.caption import Captioning

FLOOR = -20.0  # log-probabilities below have no gradient: a word that cannot be is not chased


@dataclasses.dataclass(frozen=True)
class EISL(Captioning):
    """Edit-invariant sequence loss (arXiv:2106.15078): every n-gram of the caption, wherever it fits.

    With l_t the log-probabilities at position t, the n-gram at j of the caption y fits position t by
    b_tj = mean over r < n of l_(t+r)[y_(j+r)]. Its score is the mean of b_tj over t, weighted by
    softmax_t(b_tj / temperature), and the loss is minus the mean score over all n-grams of the
    batch, averaged over `orders`. Where n is the length of all captions, it is `Caption`. The
    authors add plain cross-entropy: `EISL() * a + Caption() * b`. Captions are predicted from their
    own words, so a shifted match is conditioned on words from another place, as in the paper.
    """

    orders: tuple[int, ...] = (2,)
    """Lengths n of the n-grams."""
    temperature: float = 1.0
    """Of the softmax over positions: towards 0, the best place alone counts."""

    def __post_init__(self):
        super().__post_init__()
        if not self.orders or min(self.orders) < 1:
            raise ClipjaxError(f"EISL: orders={self.orders} must be whole numbers of at least 1")
        if self.temperature <= 0:
            raise ClipjaxError(f"EISL: temperature={self.temperature} must be above 0")

    def totals(self, context):
        counts = self.counts(context)
        return {
            str(n): jnp.maximum(jnp.sum(_windows(counts, n), dtype=jnp.float32), 1.0)
            for n in self._fitting(counts.shape[1])
        }

    def local(self, encoded, context, totals):
        counts, targets = self.counts(context), context.batch["text"][:, 1:]
        log_sum = self.stats(encoded, context).log_sum
        features, head = encoded["captions"], encoded.shared["caption_head"]
        words = jnp.take(head, targets, axis=1).astype(features.dtype)  # [D, B, T]
        fit = jnp.einsum("btd,dbj->btj", features, words, preferred_element_type=jnp.float32)
        fit = jnp.maximum(fit - log_sum[..., None], FLOOR)
        orders = self._fitting(counts.shape[1])
        score = sum(
            jnp.sum(self._scores(fit, counts, n)) / totals[str(n)] / len(orders) for n in orders
        )
        return -score, {}

    def _fitting(self, length: int) -> list[int]:
        orders = [n for n in self.orders if n <= length]
        if not orders:
            raise ClipjaxError(
                f"EISL: orders={self.orders} are all longer than the {length} tokens of a caption"
            )
        return orders

    def _scores(self, fit: jax.Array, counts: jax.Array, n: int) -> jax.Array:
        """[B, T - n + 1]: how well each n-gram of the captions fits; 0 for those with padding."""
        places = fit.shape[1] - n + 1
        b = sum(fit[:, r : r + places, r : r + places] for r in range(n)) / n
        whole = _windows(counts, n)
        # A row without any place is left one, so that its softmax is a number; it counts for nothing.
        place = whole.at[:, 0].set(True)[:, :, None]
        weights = jax.nn.softmax(jnp.where(place, b / self.temperature, -jnp.inf), axis=1)
        return jnp.where(whole, jnp.sum(weights * b, axis=1), 0.0)


def _windows(counts: jax.Array, n: int) -> jax.Array:
    """bool [B, T - n + 1]: whether all of the n tokens from here on count."""
    places = counts.shape[1] - n + 1
    return jnp.stack([counts[:, r : r + places] for r in range(n)]).all(0)
