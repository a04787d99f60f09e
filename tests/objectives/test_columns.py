"""Columns in any number and in several blocks: banks and tables; reductions that choose a column."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.mesh import MeshShape
from clipjax.objectives import Auto, Grouped, Hierarchical, PairEngine, Ring
from clipjax.objectives.pairs import ArgMax, LogSumExp, Sample, Sum, Table, TopK

sys.path.insert(0, str(Path(__file__).parent))
from jax import jit

ROWS, BANK, WORDS, WIDTH = 16, 24, 20, 6

ENGINES = {
    "one device": PairEngine(chunk=5),
    "gather, tensor": PairEngine(MeshShape(tensor=2).build(), chunk=3),
    "ring, tensor": PairEngine(MeshShape(tensor=2).build(jax.devices()[:4]), Ring(), chunk=3),
    "both": PairEngine(MeshShape(group=2, tensor=2).build(), Hierarchical(), chunk=4),
    "tensor that divides nothing": PairEngine(MeshShape(tensor=8).build(), chunk=9),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "image": (ROWS, WIDTH),
        "text": (ROWS, WIDTH),
        "bank": (BANK, WIDTH),
        "words": (WIDTH, WORDS),
        "tau": (ROWS,),
        "prior": (BANK,),
        "scale": (),
    }
    return {k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()}


def tile_of(engine):
    def tile(row, col, shared):
        key = col["word"].T if "word" in col else col["text"]
        logits = shared["scale"] * engine.dot(row["image"], key) / row["tau"][:, None]
        logits += col.get("prior", 0.0)
        other = row["index"][:, None] != col["index"]
        terms = {"log": LogSumExp(logits, other), "sum": Sum(jnp.sin(logits), other)}
        # A weight by the column's index: every column must be the one that it says.
        terms["place"] = Sum(logits * jnp.cos(col["index"]))
        return terms, {
            "log": LogSumExp(logits),
            "place": Sum(jnp.cos(row["index"])[:, None] * logits),
        }

    return tile


def blocks_of(a):
    return (
        {"text": a["text"]},
        {"text": a["bank"], "prior": a["prior"]},
        Table({"word": a["words"]}, -1),
    )


def rows_of(a):
    return {"image": a["image"], "tau": 1.5 + jnp.sin(a["tau"])}


def dense(a):
    """The statistics of `tile_of` over all blocks, from one table of all logits."""
    keys = jnp.concatenate([a["text"], a["bank"], a["words"].T])
    prior = jnp.concatenate([jnp.zeros(ROWS), a["prior"], jnp.zeros(WORDS)])
    rows = rows_of(a)
    logits = a["scale"] * jnp.matmul(rows["image"], keys.T, precision="highest")
    logits = logits / rows["tau"][:, None] + prior
    other = ~jnp.eye(*logits.shape, dtype=bool)
    cosine = jnp.cos(jnp.arange(len(keys)))
    row = {
        "log": jax.nn.logsumexp(jnp.where(other, logits, -jnp.inf), 1),
        "sum": jnp.sum(jnp.where(other, jnp.sin(logits), 0), 1),
        "place": logits @ cosine,
    }
    col = {"log": jax.nn.logsumexp(logits, 0), "place": cosine[:ROWS] @ logits}
    ends = ROWS, ROWS + BANK
    parts = {k: jnp.split(v, ends) for k, v in col.items()}
    return row, tuple({k: v[i] for k, v in parts.items()} for i in range(3))


def total(row, cols):
    """A scalar that gives every entry a cotangent of its own."""
    values = [row[k] for k in ("log", "sum", "place")] + [
        c[k] for c in cols for k in ("log", "place")
    ]
    return sum(jnp.vdot(jnp.sin(1.0 + i + jnp.arange(len(v))), v) for i, v in enumerate(values))


@pytest.mark.parametrize("name", ENGINES)
def test_a_bank_and_a_table_beside_the_batch(name):
    engine, a = ENGINES[name], arrays()

    def ours(a):
        return engine.reduce(tile_of(engine), rows_of(a), blocks_of(a), {"scale": a["scale"]})

    def f(stats):
        def loss(a):
            out = stats(a)
            return total(*out), out

        return jax.value_and_grad(loss, has_aux=True)

    got, expected = jit(f(ours))(a), f(dense)(a)
    assert len(got[0][1][1]) == 3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max()), got, expected
    )


def choices(engine, a, key):
    """The hardest, three hardest and a drawn column of each row, its own excluded; columns' the same.

    And the embedding that was drawn, from the batch or the bank.
    """

    def tile(row, col, shared):
        logits = jnp.round(2 * engine.dot(row["image"], col["text"])) / 2  # ties, many of them
        other = (row["index"][:, None] != col["index"]) & ~row["alone"][:, None]
        terms = {
            "best": ArgMax(logits, other),
            "top": TopK(logits, 3, other),
            "drawn": Sample(logits, shared, other),
        }
        return terms, terms

    rows = {"image": a["image"], "alone": np.arange(ROWS) == 2}
    row, cols = engine.reduce(tile, rows, ({"text": a["text"]}, {"text": a["bank"]}), key)
    drawn = row["drawn"]
    negative = engine.rows_at(a["text"], drawn) + engine.rows_at(a["bank"], drawn - ROWS)
    return row | {"negative": negative}, cols


@pytest.mark.parametrize("name", ["gather, tensor", "ring, tensor", "both"])
def test_choices_are_the_same_everywhere_and_ties_go_to_the_lowest_index(name):
    a, key = arrays(), jax.random.key(3)
    row, cols = jit(lambda a, k: choices(ENGINES[name], a, k))(a, key)
    logits = a["image"].astype(np.float64) @ np.concatenate([a["text"], a["bank"]]).T
    logits = np.round(2 * logits) / 2
    np.fill_diagonal(logits, -np.inf)
    logits[2] = -np.inf
    for got, table in (
        (row, logits),
        (cols[0], logits[:, :ROWS].T),
        (cols[1], logits[:, ROWS:].T),
    ):
        order = np.argsort(-table, axis=1, kind="stable")[:, :3]
        value = np.take_along_axis(table, order, 1)
        index = np.where(value == -np.inf, -1, order)
        np.testing.assert_allclose(got["top"].value, value, rtol=1e-6)
        np.testing.assert_array_equal(got["top"].index, index)
        np.testing.assert_array_equal(got["best"].index, index[:, 0])
        np.testing.assert_allclose(got["best"].value, value[:, 0], rtol=1e-6)
        assert got["top"].index.dtype == got["best"].index.dtype == got["drawn"].dtype == jnp.int32
    assert row["drawn"][2] == -1 and (np.delete(row["drawn"], 2) >= 0).all()
    keys = np.concatenate([a["text"], a["bank"], np.zeros((1, WIDTH), np.float32)])
    np.testing.assert_array_equal(row["negative"], keys[row["drawn"]])
    plain = jit(lambda a, k: choices(PairEngine(), a, k))(a, key)
    np.testing.assert_array_equal(row["drawn"], plain[0]["drawn"])
    for i in (0, 1):
        np.testing.assert_array_equal(cols[i]["drawn"], plain[1][i]["drawn"])


def test_draws_follow_the_softmax():
    """4096 rows of the same five logits: counts against probabilities, chi-squared of 4 freedoms."""
    logits = np.float32([2.0, 0.5, -30.0, 1.0, -1.0])
    n = 4096

    def tile(row, col, shared):
        drawn = Sample(
            jnp.broadcast_to(col["logit"], (len(row["zero"]), len(col["logit"]))), shared
        )
        return {"row": drawn}, {"col": drawn}

    def draw(key):
        return PairEngine(chunk=1000).reduce(tile, {"zero": jnp.zeros(n)}, {"logit": logits}, key)

    rows, cols = jit(draw)(jax.random.key(0))
    p = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(rows["row"], minlength=5)
    assert counts[2] == 0
    kept = [0, 1, 3, 4]
    assert ((counts - n * p) ** 2 / (n * p))[kept].sum() < 16.3  # 0.1 % by chance, of 3 freedoms
    assert len(set(np.asarray(cols["col"]).tolist())) == 5  # columns draw rows, evenly: all differ
    again, _ = jit(draw)(jax.random.key(1))
    assert 0.3 < np.mean(rows["row"] == again["row"]) < 0.7  # sum p^2 = 0.43


def test_a_group_meets_its_own_part_of_a_bank_and_all_of_a_table():
    a = arrays()
    engine = PairEngine(MeshShape(group=2).build(jax.devices()[:4]), Grouped(), chunk=5)

    def place(a):
        shared = {"scale": a["scale"]}
        return engine.reduce(tile_of(engine), rows_of(a), blocks_of(a), shared)[0]["place"]

    rows = rows_of(a)
    keys = np.concatenate([a["text"], a["bank"], a["words"].T])
    logits = a["scale"] * rows["image"] @ keys.T / np.asarray(rows["tau"])[:, None]
    logits[:, ROWS : ROWS + BANK] += a["prior"]
    group = np.concatenate([np.repeat((0, 1), n // 2) for n in (ROWS, BANK)] + [np.full(WORDS, 2)])
    met = (group == group[:ROWS, None]) | (group == 2)
    expected = np.where(met, logits * np.cos(np.arange(len(keys))), 0).sum(1)
    np.testing.assert_allclose(jit(place)(a), expected, atol=2e-5 * np.abs(expected).max())


def test_refusals():
    a = arrays()
    engine = PairEngine(MeshShape().build())
    with pytest.raises(
        ClipjaxError, match=r"20 columns \(block 1\) \['text'\] cannot be split over 8"
    ):
        engine.reduce(tile_of(engine), rows_of(a), ({"text": a["text"]}, {"text": a["words"].T}), a)
    with pytest.raises(ClipjaxError, match="empty sequence"):
        engine.reduce(tile_of(engine), rows_of(a), ())
    with pytest.raises(ClipjaxError, match="axis=1 must be 0"):
        Table({"word": a["words"]}, 1)

    def tile(row, col, shared):
        return ({"a": Sum(row["image"] @ col["text"].T)} if "prior" in col else {}), {}

    with pytest.raises(ClipjaxError, match="must be the same for all blocks"):
        PairEngine().reduce(tile, {"image": a["image"]}, blocks_of(a)[:2])


def test_auto_counts_every_block_that_travels():
    engine = PairEngine(MeshShape(group=2).build(), Auto(memory_gb=1e-6))
    a = arrays()
    # 8 bytes x (16 + 24) x 6 numbers and 24 of the prior: 2.1 kB, 1.06 kB a group
    for gb, ring in ((3e-6, False), (1e-6, True)):
        engine = PairEngine(engine.mesh, Auto(memory_gb=gb))
        text = str(
            jax.make_jaxpr(
                lambda a, e=engine: e.reduce(
                    tile_of(e), rows_of(a), blocks_of(a), {"scale": a["scale"]}
                )
            )(a)
        )
        assert ("ppermute" in text) == ring
