import numpy as np
import pytest

from clipjax.errors import ClipjaxError
from clipjax.evals import Geometry
from clipjax.evals.geometry import geometry


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [2, 50, 2100])
def test_agrees_with_the_definitions(n):
    rng = np.random.default_rng(n)
    x, y = unit(rng, n, 8), unit(rng, n, 8)
    y[0] = x[0]
    found = geometry(x, y)
    assert found["alignment"] == pytest.approx(
        np.mean([(a - b) @ (a - b) for a, b in zip(x, y, strict=True)])
    )
    for name, (a, b) in {"image": (x, x), "text": (y, y), "cross": (x, y)}.items():
        square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        off = ~np.eye(n, dtype=bool)
        assert found[f"uniformity/{name}"] == pytest.approx(np.log(np.exp(-2 * square)[off].mean()))
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))


def test_over_the_pictures_that_have_a_caption(shades, table):
    # Orthogonal pictures whose captions are their neighbors'; the third has none.
    source = shades((("a", "b"), ("b",), ()))
    texts = {"a": [0, 1, 0], "b": [1, 0, 0]}
    found = Geometry(source).run(table(np.eye(3), texts))
    assert found["geometry/alignment"] == pytest.approx(2.0)
    assert found["geometry/uniformity/image"] == pytest.approx(-4.0)
    assert found["geometry/uniformity/cross"] == pytest.approx(0.0)
    assert found["geometry/modality_gap"] == pytest.approx(0.0)
    with pytest.raises(ClipjaxError, match="'geometry': .* has 1 pictures with captions"):
        Geometry(shades((("a",), ()))).run(table(np.eye(3), texts))
    with pytest.raises(ClipjaxError, match="limit=1"):
        Geometry(source, limit=1)
