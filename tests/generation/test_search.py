"""What the strategies find, against searches by hand over models small enough for that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.generation import Beam, ContrastiveSearch, Greedy, Sample

PAD, BOS, EOS = 0, 1, 2
STRATEGIES = {
    "greedy": Greedy(repetition_penalty=1.5),
    "beam": Beam(width=3, length_penalty=0.7),
    "sample": Sample(temperature=0.9, top_k=6, top_p=0.9),
    "contrastive": ContrastiveSearch(alpha=0.5, k=3, min_length=4),
}


@pytest.fixture(scope="module")
def model(scribe):
    return scribe(3)


@pytest.fixture(scope="module")
def memory(model, pictures):
    return model.caption_memory(pictures)


@functools.cache
def whole_rows(model):
    return jax.jit(model.caption_logits)


def run_whole(model, memory, rows):
    """(logits, hidden states) of n rows for one picture, always 27 rows of 10: one compilation."""
    padded = np.full((27, min(10, model.positions.shape[0])), PAD, np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    outputs = whole_rows(model)(padded, np.repeat(np.asarray(memory)[None], 27, 0))
    return [np.asarray(x[: len(rows), : len(rows[0])], np.float64) for x in outputs]


def next_probs(model, memory, rows):
    """float64 [n, V] after each of n rows of equal length for one picture; padding and bos cannot come."""
    logits = run_whole(model, memory, rows)[0][:, -1]
    logits[:, [PAD, BOS]] = -np.inf
    exps = np.exp(logits - logits.max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_cached_equals_uncached_token_by_token(name, model, memory, complete):
    prompts = [[], [5], [7, 3, 4]] * 3 + [[], [9]]
    cached = complete(model, memory, STRATEGIES[name], prompts=prompts)
    uncached = complete(model, memory, STRATEGIES[name], prompts=prompts, use_cache=False)
    np.testing.assert_array_equal(cached[0], uncached[0])
    np.testing.assert_allclose(cached[1], uncached[1], rtol=1e-5, atol=1e-5)
    assert len(set(map(bytes, cached[0]))) > 5  # pictures do matter
    for row, prompt in zip(cached[0].tolist(), prompts, strict=True):
        assert row[: 1 + len(prompt)] == [BOS, *prompt]
        end = row.index(EOS) if EOS in row else len(row)
        assert PAD not in row[:end] and set(row[end + 1 :]) <= {PAD}


def test_greedy_takes_the_likeliest_token_and_adds_log_probabilities_up(model, memory, complete):
    tokens, scores = complete(model, memory, Greedy())
    for picture, row, score in zip(memory, tokens, scores, strict=True):
        expected, total = [BOS], 0.0
        while len(expected) < 10 and expected[-1] != EOS:
            probs = next_probs(model, picture, [expected])[0]
            expected.append(int(probs.argmax()))
            total += np.log(probs.max())
        assert row.tolist() == expected + [PAD] * (10 - len(expected))
        assert score == pytest.approx(total, abs=1e-4)
    assert (tokens[:, -1] == PAD).any()  # some end early


def test_lengths(model, memory, complete):
    tokens, _ = complete(model, memory, Greedy(min_length=6))
    ends = [row.index(EOS) if EOS in row else 10 for row in tokens.tolist()]
    assert min(ends) >= 7  # bos, six tokens, then eos
    shortest = [r.index(EOS) for r in complete(model, memory, Greedy())[0].tolist() if EOS in r]
    assert min(shortest) < 7


def test_the_repetition_penalty_divides_or_multiplies_by_sign(chain, complete):
    # Of 3 (seen; logit log .6 < 0 becomes 2 log .6 = log .36), 4 (.38): 4 wins. Unpenalized, 3 does.
    probs = np.full((5, 5), 1e-9)
    probs[:, 3], probs[:, 4], probs[:, 2] = 0.6, 0.38, 0.02
    module = chain(probs, np.eye(5))
    memory = np.zeros((1, 1, 1))
    assert complete(module, memory, Greedy(), 4)[0].tolist() == [[BOS, 3, 3, 3]]
    tokens, scores = complete(module, memory, Greedy(repetition_penalty=2.0), 4)
    assert tokens.tolist() == [[BOS, 3, 4, 3]]
    # 3: .6; 4: .38 / (.36 + .38 + .02); 3 again: .36 / (.36 + .38² + .02)
    by_hand = 0.6 * (0.38 / 0.76) * (0.36 / (0.36 + 0.38**2 + 0.02))
    assert scores[0] == pytest.approx(np.log(by_hand), abs=1e-5)
    # A positive logit shrinks instead: 10 * probs have logits log 6 and log 3.8; log 6 / 2 < log 3.8.
    assert complete(chain(10 * probs, np.eye(5)), memory, Greedy(repetition_penalty=2.0), 3)[
        0
    ].tolist() == [[BOS, 3, 4]]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_is_an_exhaustive_search(length_penalty, scribe, pictures, complete):
    length = 5  # bos and at most four tokens, of three words or the end
    module = scribe(1, vocabulary=6, length=length, sharpness=2.0)
    memory = module.caption_memory(pictures)
    beam = Beam(width=130, length_penalty=length_penalty)
    tokens, scores = complete(module, memory, beam, length)
    lengths = set()
    for picture, row, score in zip(memory, tokens.tolist(), scores, strict=True):
        best, caption = max(every_caption(module, picture, length, length_penalty))
        assert row == caption + [PAD] * (length - len(caption))
        assert score == pytest.approx(best, abs=1e-4)
        lengths.add(len(caption))
    assert len(lengths) > 1


def every_caption(module, picture, length, length_penalty):
    """(score, tokens) of all captions that can be."""
    open_ = [(0.0, [BOS])]
    for count in range(1, length):
        probs = next_probs(module, picture, [row for _, row in open_])
        grown = [
            (total + np.log(probs[i, token]), [*row, token])
            for i, (total, row) in enumerate(open_)
            for token in range(EOS, 6)
        ]
        done = [entry for entry in grown if entry[1][-1] == EOS or count == length - 1]
        yield from ((total / count**length_penalty, row) for total, row in done)
        open_ = [entry for entry in grown if entry[1][-1] != EOS]


def test_beam_of_width_1_is_greedy(model, memory, complete):
    prompts = [[], [4], [6, 6]] * 3 + [[], []]
    extra = {"repetition_penalty": 1.4, "min_length": 3}
    greedy = complete(model, memory, Greedy(**extra), prompts=prompts)
    beam = complete(model, memory, Beam(width=1, length_penalty=2.0, **extra), prompts=prompts)
    np.testing.assert_array_equal(beam[0], greedy[0])
    ends = [row.index(EOS) if EOS in row else 9 for row in beam[0].tolist()]
    lengths = np.array(ends) - [len(prompt) for prompt in prompts]
    np.testing.assert_allclose(beam[1] * lengths**2, greedy[1], rtol=1e-5)


def test_a_wider_beam_finds_what_greedy_misses(chain, complete):
    # Greedy takes 3 (.6), after which every token has 1/4; 4 (.4) is followed by a sure end.
    probs = np.full((7, 7), 1e-12)
    probs[BOS, [3, 4]] = 0.6, 0.4
    probs[3, [3, 4, 5, 6]] = 0.25
    probs[[4, 5, 6], EOS] = 1.0
    memory = np.zeros((2, 1, 1))
    greedy, _ = complete(chain(probs, np.eye(7)), memory, Greedy(), 6)
    tokens, scores = complete(chain(probs, np.eye(7)), memory, Beam(width=2, length_penalty=0), 6)
    assert greedy[0].tolist()[:2] == [BOS, 3]
    assert tokens.tolist() == [[BOS, 4, EOS, PAD, PAD, PAD]] * 2
    np.testing.assert_allclose(scores, np.log(0.4), rtol=1e-5)


def test_contrastive_search_with_alpha_0_or_k_1_is_greedy(model, memory, complete):
    prompts = [[], [4], [6, 6]] * 3 + [[], []]
    extra = {"repetition_penalty": 1.4, "min_length": 3}
    greedy = complete(model, memory, Greedy(**extra), prompts=prompts)
    for strategy in (
        ContrastiveSearch(alpha=0.0, k=5, **extra),
        ContrastiveSearch(alpha=0.9, k=1, **extra),
    ):
        tokens, scores = complete(model, memory, strategy, prompts=prompts)
        np.testing.assert_array_equal(tokens, greedy[0])
        np.testing.assert_allclose(scores, greedy[1], rtol=1e-5, atol=1e-5)


def test_contrastive_search_follows_the_published_score(model, memory, complete):
    alpha, k = 0.7, 4
    tokens, scores = complete(model, memory, ContrastiveSearch(alpha=alpha, k=k))
    for picture, row, score in zip(memory, tokens.tolist(), scores, strict=True):
        expected, total = [BOS], 0.0
        while len(expected) < 10 and expected[-1] != EOS:
            probs = next_probs(model, picture, [expected])[0]
            merits = {}
            for token in np.argsort(-probs)[:k].tolist():
                h = run_whole(model, picture, [[*expected, token]])[1][0]
                h /= np.linalg.norm(h, axis=1, keepdims=True)
                merits[token] = (1 - alpha) * probs[token] - alpha * (h[:-1] @ h[-1]).max()
            expected.append(max(merits, key=merits.get))
            total += np.log(probs[expected[-1]])
        assert row == expected + [PAD] * (10 - len(expected))
        assert score == pytest.approx(total, abs=1e-4)


def test_contrastive_search_leaves_a_loop_that_greedy_stays_in(chain, complete):
    # 3 is followed by 3 with .6, by 4 with .4; hidden states of 3 and 4 are orthogonal.
    probs = np.full((5, 5), 1e-9)
    probs[[BOS, 3], 3], probs[[BOS, 3], 4] = 0.6, 0.4
    probs[4, EOS] = 1.0
    hidden = np.eye(5)
    memory = np.zeros((1, 1, 1))
    looping, _ = complete(chain(probs, hidden), memory, Greedy(), 6)
    assert looping.tolist() == [[BOS, 3, 3, 3, 3, 3]]
    # 3 again: .6 * .4 - .6 * 1 < 4: .4 * .4 - 0
    tokens, scores = complete(chain(probs, hidden), memory, ContrastiveSearch(alpha=0.6, k=2), 6)
    assert tokens.tolist() == [[BOS, 3, 4, EOS, PAD, PAD]]
    assert scores[0] == pytest.approx(np.log(0.6 * 0.4), abs=1e-4)


def test_samples_have_the_frequencies_of_the_model(chain, complete):
    probs = np.full((6, 6), 1e-12)
    probs[BOS, 3:] = 0.5, 0.3, 0.2
    probs[3:, EOS] = 1.0
    strategy = Sample(temperature=0.5, top_k=2)
    tokens, scores = complete(chain(probs, np.eye(6)), np.zeros((4000, 1, 1)), strategy, 3)
    frequencies = np.bincount(tokens[:, 1], minlength=6) / 4000
    # Standard deviation: .007
    np.testing.assert_allclose(frequencies[3:], [0.25 / 0.34, 0.09 / 0.34, 0], atol=0.03)
    np.testing.assert_allclose(np.exp(scores), probs[BOS, tokens[:, 1]], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        # top_p counts in what top_k leaves: .625 of it is the first alone.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([25, 9, 2.25, 0.25]) / 36.5),
        # Squared and normalized: .685, .247, ...
        ({"temperature": 0.5, "top_p": 0.7}, [25 / 34, 9 / 34, 0, 0]),
    ],
)
def test_what_samples_are_drawn_from(settings, expected):
    order = np.array([2, 0, 3, 1])  # the vocabulary is not sorted by probability
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))[:, order]
    kept = Sample(**settings).truncate(log_probs)
    np.testing.assert_allclose(jax.nn.softmax(kept)[0], np.array(expected)[order], atol=1e-6)


def test_samples_depend_on_the_seed_and_the_row_alone(model, memory, complete):
    strategy = Sample(temperature=1.5)
    tokens, _ = complete(model, memory, strategy, seed=7)
    np.testing.assert_array_equal(complete(model, memory, strategy, seed=7)[0], tokens)
    assert (complete(model, memory, strategy, seed=8)[0] != tokens).any()
    some = np.array([9, 2, 5])
    part = complete(model, memory[some], strategy, seed=7, rows=some)[0]
    np.testing.assert_array_equal(part, tokens[some])


def test_the_loop_stops_when_all_have_ended(chain, complete):
    """Counted in steps of the model, through a cache that counts."""
    probs = np.full((5, 5), 1e-12)
    probs[BOS, 3], probs[3, EOS], probs[2, 2] = 1.0, 1.0, 1.0
    steps = []

    class Counting(chain):
        def decode(self, tokens, start, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().decode(tokens, start, cache)

    for strategy in (Greedy(), Sample(), Beam(width=2), ContrastiveSearch(k=2)):
        steps.clear()
        tokens, _ = complete(Counting(probs, np.eye(5)), jnp.zeros((3, 1, 1)), strategy, 50)
        jax.effects_barrier()
        assert tokens[:, :3].tolist() == [[BOS, 3, EOS]] * 3
        assert len(steps) <= 4, strategy


def test_a_row_is_the_same_whatever_stands_beside_it(model, memory, complete):
    prompts = [[], [5], [7, 3, 4]] * 3 + [[], [9]]
    for name in ("beam", "contrastive"):
        together, _ = complete(model, memory, STRATEGIES[name], prompts=prompts)
        for i in (1, 2, 9):
            others = np.repeat(memory[i : i + 1], len(memory), axis=0)
            alone, _ = complete(model, others, STRATEGIES[name], prompts=[prompts[i]] * 11)
            np.testing.assert_array_equal(alone, np.repeat(together[i : i + 1], 11, axis=0))
