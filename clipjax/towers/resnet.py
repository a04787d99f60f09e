"""ResNet: the convolutional image tower of CLIP (arXiv:2103.00020, section 2.4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from clipjax.errors import ClipjaxError, did_you_mean
from clipjax.layout import batch_first
from clipjax.towers import layers
from clipjax.towers.base import Tower, everything, require, require_choice, require_positive
from clipjax.towers.pixels import normalize, require_images, require_normalization
from clipjax.towers.transformer import DTYPES, stack

SIZES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    # name: (blocks of each stage, width, output_dim, image_size), arXiv:2103.00020, table 19
    "RN50": ((3, 4, 6, 3), 64, 1024, 224),
    "RN101": ((3, 4, 23, 3), 64, 512, 224),
    "RN50x4": ((4, 6, 10, 6), 80, 640, 288),
    "RN50x16": ((6, 8, 18, 8), 96, 768, 384),
    "RN50x64": ((3, 15, 36, 10), 128, 1024, 448),
}
STRIDE = 32  # of the whole network: the stem's 4, then 1, 2, 2, 2
HEAD_WIDTH = 64  # channels of an attention head in the published sizes
EXPANSION = 4  # a block's output has this many times its width
REMAT = ("none", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet(Tower):
    """CLIP's ResNet: three stem convolutions, antialiased strides, attention pooling.

    The pooling projects to `output_dim` by itself, so a `DualEncoder` with
    `embed_dim=output_dim, image_projection="none"` is CLIP's. With batch normalization the
    embedding of an image depends in training on the other images; see `BatchNorm`.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Bottleneck blocks in each of the four stages."""
    width: int = 64
    """Channels inside a block of the first stage, even; the last features have 32 times as many."""
    output_dim: int = 1024
    """Channels of the tokens and the pooled vector."""
    heads: int | None = None
    """Heads of the attention pooling; None is one for every 64 of the last features' channels."""
    image_size: int | tuple[int, int] = 224
    """Side of the images in pixels, or (height, width); a multiple of 32."""
    freeze_stats: bool = False
    """Normalize with the running statistics in training too and leave them alone: a locked tower."""
    momentum: float = 0.1
    """Share of the newest batch in the running statistics."""
    eps: float = 1e-5
    """Added to the variance by every norm."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16; parameters, statistics and softmax stay float32."""
    scan: bool = True
    """Compile one block of each stage and loop over it, instead of compiling every block."""
    remat: str = "none"
    """Recomputed in the backward pass: none, or full (every block, from its input)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides them after that."""

    def __post_init__(self) -> None:
        require_positive(self, "width", "output_dim")
        require(
            len(self.blocks) == 4 and all(isinstance(n, int) and n >= 1 for n in self.blocks),
            f"ResNet.blocks={self.blocks} must be four whole numbers of at least 1",
        )
        require(self.width % 2 == 0, f"ResNet.width={self.width} must be even: the stem has half")
        if self.heads is not None:
            require_positive(self, "heads")
        require(
            self.features % self.num_heads == 0,
            f"ResNet.heads={self.num_heads} does not divide the {self.features} channels of the "
            f"last features (32 * ResNet.width={self.width})",
        )
        for side in self.image_shape:
            require(
                isinstance(side, int) and side >= 1 and side % STRIDE == 0,
                f"ResNet.image_size={self.image_size} is no multiple of {STRIDE}",
            )
        require(0 < self.momentum <= 1, f"ResNet.momentum={self.momentum} must be in (0, 1]")
        require(self.eps > 0, f"ResNet.eps={self.eps!r} must be above 0")
        require_choice(self, "dtype", DTYPES)
        require_choice(self, "remat", REMAT)
        require_normalization(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ResNet:
        """A published size.

        Args:
          name: RN50, RN101, RN50x4, RN50x16 or RN50x64.
          **overrides: any other fields, or these.

        Raises:
          ClipjaxError: the name is unknown.
        """
        if name not in SIZES:
            raise ClipjaxError(f"unknown ResNet preset {name!r}{did_you_mean(name, SIZES)}")
        blocks, width, output_dim, image_size = SIZES[name]
        fields: dict[str, Any] = {"blocks": blocks, "width": width, "output_dim": output_dim}
        return cls(**(fields | {"image_size": image_size} | overrides))

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the last features."""
        return self.image_shape[0] // STRIDE, self.image_shape[1] // STRIDE

    @property
    def features(self) -> int:
        """Channels of the last features."""
        return 32 * self.width

    @property
    def num_heads(self) -> int:
        """Heads of the attention pooling."""
        return max(1, self.features // HEAD_WIDTH) if self.heads is None else self.heads

    def build(self, rngs: nnx.Rngs) -> ResNetModule:
        return ResNetModule(self, rngs)


class ResNetModule(nnx.Module):
    """The module of `ResNet`.

    Layout: `stem` holds conv1, bn1, conv2, bn2, conv3, bn3. Each of `layer1` ... `layer4` holds
    `first`, the block that changes the shape (with downsample_conv and downsample_bn), and `blocks`,
    the others stacked along a leading axis (absent where there are none); a block holds conv1, bn1,
    conv2, bn2, conv3, bn3. `pool` holds positions, q, k, v and out. Convolution kernels are
    [height, width, in, out], without bias. Names follow OpenAI's: `layer2.3.conv1` there is
    `layer2/blocks/conv1` at index 2 here.
    """

    def __init__(self, config: ResNet, rngs: nnx.Rngs):
        self.config, self.width = config, config.output_dim
        self.stem = Stem(config, rngs)
        c = config.width
        self.layer1 = Stage(config, c, c, config.blocks[0], 1, rngs)
        self.layer2 = Stage(config, 4 * c, 2 * c, config.blocks[1], 2, rngs)
        self.layer3 = Stage(config, 8 * c, 4 * c, config.blocks[2], 2, rngs)
        self.layer4 = Stage(config, 16 * c, 8 * c, config.blocks[3], 2, rngs)
        self.pool = GridAttentionPool(config, rngs)

    def __call__(
        self, image: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Images to tokens and one vector.

        Args:
          image: [B, H, W, 3] uint8, or float in 0..1.
          key: any key in training: batches are normalized with their own statistics and the running
            ones updated (nothing is drawn from it). None in inference.

        Returns:
          tokens [B, N, D], one for each position of the last features, row by row, and pooled
          [B, D], both in the compute dtype; D is `output_dim`.

        Raises:
          ClipjaxError: the images are of another shape.
        """
        config = self.config
        require_images(image, config.image_shape, "ResNet")
        training = key is not None and not config.freeze_stats
        x = self.stem(normalize(image, config), training)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, training)
        return self.pool(x)

    def describe(self, image: jax.Array, *, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """Where the tokens come from, as in `Tower`: their index, row by row in `config.grid`."""
        return everything(len(image), self.config.grid[0] * self.config.grid[1])


class Conv(nnx.Module):
    """Convolution without bias, kernel [H, W, in, out] drawn as He et al. do (arXiv:1502.01852)."""

    def __init__(self, size: int, d_in: int, d_out: int, rngs: nnx.Rngs, *, stride: int = 1):
        self.stride, self.padding = stride, size // 2
        shape = (size, size, d_in, d_out)
        self.kernel = layers.normal(rngs, shape, (2 / layers.fan_in(shape)) ** 0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H / stride, W / stride, out], in the dtype of `x`."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return batch_first(y)


class BatchNorm(nnx.Module):
    """Batch normalization (arXiv:1502.03167) over everything but the channels, in float32.

    In training, mean and variance are those of the batch that the step sees: of the *global* batch
    on any mesh ("synchronized"; under GSPMD the mean over a sharded axis is the mean over all
    devices), of one micro-batch when the step accumulates (train/step.py then averages the running
    statistics over the micro-batches). The running variance is the unbiased one, as in PyTorch.
    """

    def __init__(self, config: ResNet, width: int, *, scale: float = 1.0):
        self.momentum, self.eps = config.momentum, config.eps
        self.scale = nnx.Param(jnp.full(width, scale))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[B, H, W, C] -> the same, in the dtype of `x`; in training, updates `mean` and `var`."""
        y = x.astype(jnp.float32)
        mean, var = self._batch_statistics(y) if training else (self.mean[...], self.var[...])
        y = (y - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
        return y.astype(x.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Both means in one pass over x, and one all-reduce. Centering at the running mean keeps
        # E[x²] - E[x]² from cancelling; being a constant, it changes neither value nor gradient.
        center = jax.lax.stop_gradient(self.mean[...])
        shifted = x - center
        mean, square = shifted.mean((0, 1, 2)), jnp.square(shifted).mean((0, 1, 2))
        var = jnp.maximum(square - jnp.square(mean), 0.0)
        mean = mean + center
        n = x.shape[0] * x.shape[1] * x.shape[2]
        unbiased = var * (n / max(n - 1, 1))
        for running, newest in ((self.mean, mean), (self.var, unbiased)):
            newest = jax.lax.stop_gradient(newest)
            running[...] = (1 - self.momentum) * running[...] + self.momentum * newest
        return mean, var


class Stem(nnx.Module):
    """Three 3x3 convolutions, the first with stride 2, and an average pooling of 2x2."""

    def __init__(self, config: ResNet, rngs: nnx.Rngs):
        half = config.width // 2
        self.conv1 = Conv(3, 3, half, rngs, stride=2)
        self.bn1 = BatchNorm(config, half)
        self.conv2 = Conv(3, half, half, rngs)
        self.bn2 = BatchNorm(config, half)
        self.conv3 = Conv(3, half, config.width, rngs)
        self.bn3 = BatchNorm(config, config.width)

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4, W / 4, width]."""
        x = jax.nn.relu(self.bn1(self.conv1(x), training))
        x = jax.nn.relu(self.bn2(self.conv2(x), training))
        x = jax.nn.relu(self.bn3(self.conv3(x), training))
        return average_pool(x, 2)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    Strides are average poolings before a convolution of stride 1, which antialiases them
    (arXiv:1904.11486), on the shortcut too (arXiv:1812.01187).
    """

    def __init__(
        self, config: ResNet, d_in: int, width: int, rngs: nnx.Rngs, *, first: bool, stride: int = 1
    ):
        d_out = EXPANSION * width
        self.stride = stride
        self.conv1 = Conv(1, d_in, width, rngs)
        self.bn1 = BatchNorm(config, width)
        self.conv2 = Conv(3, width, width, rngs)
        self.bn2 = BatchNorm(config, width)
        self.conv3 = Conv(1, width, d_out, rngs)
        # A new block is its shortcut: what it adds starts at zero (arXiv:1706.02677, as in CLIP).
        self.bn3 = BatchNorm(config, d_out, scale=0.0)
        self.downsample_conv = Conv(1, d_in, d_out, rngs) if first else None
        self.downsample_bn = BatchNorm(config, d_out) if first else None

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[B, H, W, d_in] -> [B, H / stride, W / stride, 4 * width]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), training))
        y = jax.nn.relu(self.bn2(self.conv2(y), training))
        y = self.bn3(self.conv3(average_pool(y, self.stride)), training)
        if self.downsample_conv is not None and self.downsample_bn is not None:
            x = self.downsample_bn(self.downsample_conv(average_pool(x, self.stride)), training)
        return jax.nn.relu(x + y)


class Stage(nnx.Module):
    """A block that changes the shape, then blocks that keep it, stacked and scanned."""

    def __init__(
        self, config: ResNet, d_in: int, width: int, depth: int, stride: int, rngs: nnx.Rngs
    ):
        self.depth, self.scan, self.remat = depth, config.scan, config.remat == "full"
        self.first = Bottleneck(config, d_in, width, rngs, first=True, stride=stride)
        self.blocks = (
            stack(
                lambda rngs: Bottleneck(config, EXPANSION * width, width, rngs, first=False),
                depth - 1,
                rngs,
            )
            if depth > 1
            else None
        )

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """[B, H, W, d_in] -> [B, H / stride, W / stride, 4 * width]."""
        x, stats = self._run(x, *nnx.split(self.first), training, looped=False)
        if training:
            nnx.update(self.first, stats)
        if self.blocks is None:
            return x
        graphdef, state = nnx.split(self.blocks)

        def step(x, state):
            return self._run(x, graphdef, state, training, looped=self.scan)

        if self.scan:
            x, stats = jax.lax.scan(step, x, state)
        else:
            each = []
            for i in range(self.depth - 1):
                x, stats = step(x, jax.tree.map(lambda leaf, i=i: leaf[i], state))
                each.append(stats)
            stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        if training:
            nnx.update(self.blocks, stats)
        return x

    def _run(self, x, graphdef, state, training, looped):
        """The output of one block, and in training its updated statistics (None in inference)."""

        def block(x, state):
            module = nnx.merge(graphdef, state)
            y = module(x, training)
            return y, nnx.state(module, nnx.BatchStat) if training else None

        if self.remat:
            # In a loop the compiler cannot undo the recomputation: no barriers against that needed.
            block = jax.checkpoint(block, prevent_cse=not looped)
        return block(x, state)


class GridAttentionPool(nnx.Module):
    """CLIP's attention pooling: the mean of all positions asks, all positions and it are asked.

    Learned positions are added before. The tokens are each position's value sent through the output
    projection: what attention would return if it looked at that position alone, in the space of the
    pooled vector (MaskCLIP, arXiv:2112.01071). They cost nothing in a compiled program that ignores
    them.
    """

    def __init__(self, config: ResNet, rngs: nnx.Rngs):
        width, std = config.features, config.features**-0.5
        self.heads = config.num_heads
        self.positions = layers.normal(rngs, (config.grid[0] * config.grid[1] + 1, width), std)
        self.q = layers.Linear(width, width, rngs)
        self.k = layers.Linear(width, width, rngs)
        self.v = layers.Linear(width, width, rngs)
        self.out = layers.Linear(width, config.output_dim, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C] -> tokens [B, H * W, D] and pooled [B, D]."""
        x = rearrange(x, "b h w c -> b (h w) c")
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.positions[...].astype(x.dtype)
        values = self.v(x)
        q, k, v = (
            rearrange(y, "b n (h d) -> b n h d", h=self.heads)
            for y in (self.q(x[:, :1]), self.k(x), values)
        )
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
        attended = jnp.einsum("bhnm,bmhd->bnhd", weights, v)
        return self.out(values[:, 1:]), self.out(rearrange(attended, "b 1 h d -> b (h d)"))


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size, W / size, C]: means of squares that do not overlap."""
    if size == 1:
        return x
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=size, q=size)
