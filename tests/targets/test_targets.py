"""Small steps compiled for the real thing: four TPU v5e chips and eight H100. `make test-targets`.

They need the extras plan-tpu and plan-gpu, and no device.
"""

import dataclasses
import importlib.util
from itertools import permutations

import pytest

from clipjax import Run, Sharding
from clipjax.bench.target import compile_on
from clipjax.data import BPE, Data, Tfds
from clipjax.models import DualEncoder
from clipjax.objectives import AllGather, Ring, Softmax
from clipjax.optim import AdamW, Duration
from clipjax.plan.machines import machine
from clipjax.plan.program import compiled_for
from clipjax.towers import TextTransformer, ViT

PACKAGES = {"v5e-4": "libtpu", "h100x8": "jax_cuda12_plugin"}
ROWS, DEPTH, WIDTH = 40, 2, 512  # rows: pairs a chip


def run(devices, accumulate=1, **tower):
    tower = dict(width=WIDTH, depth=DEPTH, heads=8, dtype="bfloat16") | tower
    return Run(
        model=DualEncoder(
            image=ViT(image_size=224, patch_size=16, **tower),
            text=TextTransformer(vocab_size=1024, context_length=16, **tower),
        ),
        objective=Softmax(),
        data=Data(
            Tfds("none"), BPE(vocab_size=1024), image_size=224,
            batch_size=ROWS * devices, context_length=16,
        ),
        optimizer=AdamW(),
        duration=Duration(1000),
        sharding=Sharding(fsdp=True),
        exchange=Ring(),
        accumulate=accumulate,
        pair_dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture(scope="module", params=sorted(PACKAGES))
def found(request):
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    on = machine(request.param)
    return compiled_for(run(on.devices), on, [], 10_000)


def test_what_blocks_keep(found):
    """14 [N, D] in bfloat16 a block and picture, padded to tiles of 16 on TPUs, and one block's own work."""
    kept = DEPTH * ROWS * 208 * WIDTH * 2 * 14
    assert kept < found["temporary"] < 2.5 * kept


def test_weights_travel_in_bfloat16_and_once_each_way(found):
    """Gathered for the forward and the backward pass; embeddings and the token table besides."""
    held = found["state"]["params"]
    others = found["devices"] - 1
    gathered = found["sent"]["all-gather"]
    assert others * held / 2 < gathered < 2.3 * others * held / 2
    assert sum(found["sent"].values()) < 8 * others * held


def along_the_whole_batch(found):
    """Arrays of the program, scalars and all, that have as many numbers along an axis as the batch has rows."""
    assert f"bf16[{ROWS},{WIDTH}]" in found["arrays"]  # down to the size of a device's embeddings
    shapes = {name: name.split("[")[1].rstrip("]").split(",") for name in found["arrays"]}
    return [name for name, axes in shapes.items() if str(ROWS * found["devices"]) in axes]


@pytest.mark.parametrize(
    "found", ["h100x8"], indirect=True
)  # a TPU's shapes do not tell the layout
def test_pictures_lie_one_after_another(found):
    """No activations with the batch last: what blocks hand on is read by products as it lies."""
    activations = {f"{ROWS},197,{width}" for width in (WIDTH, 4 * WIDTH)}
    seen = {name.split("[")[1].rstrip("]") for name in found["arrays"]}
    assert activations <= seen
    orders = {",".join(order) for axes in activations for order in permutations(axes.split(","))}
    assert {axes for axes in seen & orders if not axes.startswith(f"{ROWS},")} == set()


def test_no_table_of_pairs_and_no_columns_of_the_whole_batch(found):
    """The ring meets the columns a block at a time: no N x N, no N x E of any dtype, whole or by the device."""
    n = ROWS * found["devices"]
    assert along_the_whole_batch(found) == []
    block = ROWS * WIDTH * 2  # bfloat16: round once for the statistics, once with the gradients
    assert (n / ROWS - 1) * 2 * block < found["sent"]["collective-permute"]


def test_gathered_columns_are_seen():
    """What the ring does not have, `AllGather` has, so that its absence says something."""
    if importlib.util.find_spec(PACKAGES["h100x8"]) is None:
        pytest.skip("jax_cuda12_plugin is not installed")
    gathered = dataclasses.replace(run(8, depth=1), exchange=AllGather())
    seen = along_the_whole_batch(compiled_for(gathered, machine("h100x8"), [], 10_000))
    assert f"bf16[{8 * ROWS},{WIDTH}]" in seen


def test_one_island_has_no_slow_links(found):
    assert found["network"] == {}


def test_arithmetic_explains_what_the_compiler_plans(found):
    """Activations, gathered weights, gradients and the loss, against all that is temporary."""
    assert 0.5 < sum(found["temporary_parts"].values()) / found["temporary"] < 1.3


def test_micro_batches_send_no_more():
    """Of eight: split weights are gathered once, in float32, and gradients reduced once."""
    if importlib.util.find_spec(PACKAGES["h100x8"]) is None:
        pytest.skip("jax_cuda12_plugin is not installed")
    on = machine("h100x8")
    found = compiled_for(run(on.devices, accumulate=8), on, [], 10_000)
    others = (on.devices - 1) * found["state"]["params"]
    assert found["sent"]["all-gather"] < 1.05 * others
    assert found["sent"]["reduce-scatter"] + found["sent"]["all-reduce"] / 2 < 1.05 * others


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_loss_is_kernels_and_travels_twice(name, objective):
    """N = 65,536, E = 768: columns go out and their gradient comes back, in bfloat16; it is never held whole."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    rows, width = 65_536, 768
    way = "AllGather, gradient in bfloat16"
    found = compile_on(machine(name), rows, width, objective, "bfloat16", [way])[way]
    assert found["kernels"] >= 2  # statistics and gradient
    assert found["wire"] <= 2.05
    gathered, float32, tile = 2 * rows * width, 4 * rows * width, 2 * 8192**2
    assert found["temp"] < gathered + float32 + tile
