"""Dense objectives in NumPy float64, with their gradients worked out by hand.

Every oracle takes image x and text y [N, E], scale s, bias b, ids [N] and teachers, and returns the
loss and {"image", "text", "logit_scale", "logit_bias"} gradients. G is the gradient with respect to
the N x N logits.
"""

import numpy as np


def case(n, width=16, spread=0.8, scale=10.0, bias=-3.0, seed=0):
    """Inputs of a batch whose losses are of order 1. Rows 0, 1 and 4, 5, 6 share their id."""
    rng = np.random.default_rng(seed)

    def unit(a):
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    x = unit(rng.normal(size=(n, width)))
    y = unit(x + spread * rng.normal(size=(n, width)))
    ids = np.arange(n) + 100
    ids[1:2], ids[5:7] = ids[0:1], ids[4:5]
    teacher = {k: unit(v + 0.5 * rng.normal(size=v.shape)) for k, v in (("image", x), ("text", y))}
    # what float32 can hold, so that rounding of the inputs is no part of any error
    values = {"x": x, "y": y, "u": teacher["image"], "v": teacher["text"]}
    values = {k: a.astype(np.float32).astype(np.float64) for k, a in values.items()}
    return values | {"s": float(scale), "b": float(bias), "ids": ids}


def log_sum_exp(logits, axis):
    top = logits.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(logits - top).sum(axis, keepdims=True))


def probabilities(logits, axis):
    return np.exp(logits - log_sum_exp(logits, axis))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def finish(loss, g, c, bias=0.0):
    x, y, s = c["x"], c["y"], c["s"]
    return loss, {
        "image": s * g @ y,
        "text": s * g.T @ x,
        "logit_scale": (g * (x @ y.T)).sum(),
        "logit_bias": g.sum() * bias,
    }


def cross_entropy(c, row_target, col_target, weight=0.5):
    """Both directions against targets: rows of the one sum to 1, columns of the other."""
    n, logits = len(c["x"]), c["s"] * c["x"] @ c["y"].T
    loss, g = 0.0, 0.0
    for axis, target, w in ((1, row_target, weight), (0, col_target, 1 - weight)):
        loss += w * (log_sum_exp(logits, axis).sum() - (target * logits).sum()) / n
        g = g + w * (probabilities(logits, axis) - target) / n
    return finish(loss, g, c)


def softmax(c, smoothing=0.0, weight=0.5):
    n = len(c["x"])
    target = (1 - smoothing) * np.eye(n) + smoothing / n
    return cross_entropy(c, target, target, weight)


def same_id(c):
    return c["ids"][:, None] == c["ids"][None]


def multi_positive(c):
    same = same_id(c).astype(float)
    return cross_entropy(c, same / same.sum(1, keepdims=True), same / same.sum(0, keepdims=True))


def weighted(c, sharpness=0.0, locked="image", weight=0.5):
    u = c["u"] if locked == "image" else c["v"]
    w = np.exp(sharpness * (u @ u.T - 1)) if sharpness else (1 + u @ u.T) / 2
    target, eye = w / w.sum(1, keepdims=True), np.eye(len(u))
    if locked == "image":
        return cross_entropy(c, target, eye, weight)
    return cross_entropy(c, eye, target.T, 1 - weight)


def pairwise_sigmoid(c, by_id=False):
    n = len(c["x"])
    sign = np.where(same_id(c) if by_id else np.eye(n, dtype=bool), 1.0, -1.0)
    logits = c["s"] * c["x"] @ c["y"].T + c["b"]
    loss = np.log1p(np.exp(-sign * logits)).sum() / n
    return finish(loss, -sign * sigmoid(-sign * logits) / n, c, bias=1.0)


def decoupled(c, sigma=None):
    n, logits = len(c["x"]), c["s"] * c["x"] @ c["y"].T
    others = np.where(np.eye(n, dtype=bool), -np.inf, logits)
    weight = np.ones(n)
    if sigma:
        e = np.exp((c["x"] * c["y"]).sum(1) / sigma)
        weight = 2 - e / e.mean()
    loss = -(weight * np.diag(logits)).mean()
    g = -np.diag(weight) / n
    for axis in (0, 1):
        loss += 0.5 * log_sum_exp(others, axis).mean()
        g = g + 0.5 * probabilities(others, axis) / n
    return finish(loss, g, c)


def decoupled_softmax(c):
    n, logits, same = len(c["x"]), c["s"] * c["x"] @ c["y"].T, same_id(c)
    others = np.where(same, -np.inf, logits)
    loss, g = 0.0, 0.0
    for axis in (0, 1):
        margin = log_sum_exp(others, axis) - logits
        share = same / same.sum(axis, keepdims=True)
        loss += 0.5 * (share * np.log1p(np.exp(margin))).sum() / n
        pull = share * sigmoid(margin)
        push = probabilities(others, axis) * pull.sum(axis, keepdims=True)
        g = g + 0.5 * (push - pull) / n
    return finish(loss, g, c)


def soft_target(c, alpha):
    n, s, eye = len(c["x"]), c["s"], np.eye(len(c["x"]))
    a, b = s * c["x"] @ c["v"].T, s * c["u"] @ c["y"].T  # image queries; text queries, transposed
    teacher = s * c["u"] @ c["v"].T
    loss, grads = 0.0, []
    for axis, logits in ((1, a), (0, b)):
        target = alpha * probabilities(teacher, axis) + (1 - alpha) * eye
        loss += 0.5 * (log_sum_exp(logits, axis).sum() - (target * logits).sum()) / n
        grads.append(0.5 * (probabilities(logits, axis) - target) / n)
    ga, gb = grads
    return loss, {
        "image": s * ga @ c["v"],
        "text": s * gb.T @ c["u"],
        "logit_scale": (ga * a + gb * b).sum() / s,
        "logit_bias": 0.0,
    }


def grouped(oracle, c, groups, **options):
    """The block-diagonal oracle: the mean over groups of the objective on each group alone."""
    n = len(c["x"]) // groups
    parts = []
    for i in range(groups):
        block = {k: v[i * n : (i + 1) * n] if np.ndim(v) else v for k, v in c.items()}
        parts.append(oracle(block, **options))
    return np.mean([p[0] for p in parts]), {
        "image": np.concatenate([p[1]["image"] for p in parts]) / groups,
        "text": np.concatenate([p[1]["text"] for p in parts]) / groups,
        "logit_scale": np.mean([p[1]["logit_scale"] for p in parts]),
        "logit_bias": np.mean([p[1]["logit_bias"] for p in parts]),
    }
