"""Image towers that OpenCLIP takes from timm by name: SigLIP's, PE core's, EVA's and CLIP's ViTs.

A name says what the weights cannot: heads, activation, norms, rotations. The sizes that can be seen in
the weights are taken from there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from clipjax.errors import ClipjaxError
from clipjax.interop import family
from clipjax.interop.family import HALF, OPENAI_MEAN, OPENAI_STD, Description
from clipjax.interop.table import (
    Rule,
    Split,
    Transpose,
    layered,
    linear,
    norm,
    packed,
    patches,
    same,
    squeezed,
)
from clipjax.towers import ViT

_TRUNK = "visual.trunk"
_BLOCK, _OURS = f"{_TRUNK}.blocks.{{i}}", "image/blocks"
Sizes = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One family of timm's names.

    Attributes:
      name: of a model, with {size}, {patch} and {side} in it.
      sizes: by their name, (width, depth, heads, mlp_dim).
      fields: of the `ViT`, given the size's name and the grid of the name.
      attention: the rules of attention's projections.
      mlp: the rules of the MLP.
      projection: where the embedding's projection stands: "trunk" (timm's classifier, with a bias) or
        "head" (OpenCLIP's own, or none).
      pixels: mean and standard deviation where the configuration says none.
    """

    name: str
    sizes: dict[str, Sizes]
    fields: Callable[[str, tuple[int, int]], dict[str, Any]]
    attention: Callable[[], list[Rule]]
    mlp: Callable[[], list[Rule]]
    projection: str = "trunk"
    pixels: tuple[Any, Any] = (OPENAI_MEAN, OPENAI_STD)

    def match(self, name: str) -> tuple[str, int, int] | None:
        """(size, patch size, pixels) of a name of this kind."""
        pattern = re.escape(self.name).replace(r"\{size\}", "(?P<size>[a-z0-9]+)")
        pattern = pattern.replace(r"\{patch\}", r"(?P<patch>\d+)").replace(
            r"\{side\}", r"(?P<side>\d+)"
        )
        found = re.fullmatch(pattern, name)
        if found is None or found["size"] not in self.sizes:
            return None
        return found["size"], int(found["patch"]), int(found["side"])

    def tower(self, size: str, patch: int, side: int, **pixels: Any) -> ViT:
        """The tower that a name stands for."""
        names = ("width", "depth", "heads", "mlp_dim")
        sizes: dict[str, Any] = dict(zip(names, self.sizes[size], strict=True))
        grid = (side // patch, side // patch)
        fields = {"patch_size": patch, "image_size": side, **self.fields(f"{size}_{patch}", grid)}
        return ViT(**(sizes | fields | pixels))


def _fused(*, key_bias: bool = True) -> list[Rule]:
    qkv = [f"{_OURS}/attn/{x}" for x in "qkv"]
    if key_bias:
        rules = packed(f"{_BLOCK}.attn.qkv.", qkv)
    else:
        kernels = tuple(f"{x}/kernel" for x in qkv)
        rules = [
            Rule(f"{_BLOCK}.attn.qkv.weight", kernels, (Split(3), Transpose((1, 0)))),
            *same(f"{_BLOCK}.attn.q_bias", f"{_OURS}/attn/q/bias"),
            *same(f"{_BLOCK}.attn.v_bias", f"{_OURS}/attn/v/bias"),
        ]
    return [*rules, *linear(f"{_BLOCK}.attn.proj", f"{_OURS}/attn/out")]


def _apart() -> list[Rule]:
    return [
        *linear(f"{_BLOCK}.attn.q_proj", f"{_OURS}/attn/q"),
        *linear(f"{_BLOCK}.attn.k_proj", f"{_OURS}/attn/k", bias=False),
        *linear(f"{_BLOCK}.attn.v_proj", f"{_OURS}/attn/v"),
        *norm(f"{_BLOCK}.attn.norm", f"{_OURS}/attn/norm"),
        *linear(f"{_BLOCK}.attn.proj", f"{_OURS}/attn/out"),
    ]


def _plain_mlp() -> list[Rule]:
    return [
        *linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}/mlp/fc1"),
        *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/fc2"),
    ]


def _swiglu() -> list[Rule]:
    return [
        *linear(f"{_BLOCK}.mlp.fc1_g", f"{_OURS}/mlp/gate"),
        *linear(f"{_BLOCK}.mlp.fc1_x", f"{_OURS}/mlp/fc1"),
        *norm(f"{_BLOCK}.mlp.norm", f"{_OURS}/mlp/norm"),
        *linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}/mlp/fc2"),
    ]


_TANH = ("giantopt_16", "base_32")  # SigLIP 2's; the others have the exact GELU


def _siglip(size: str, grid: tuple[int, int]) -> dict[str, Any]:
    activation = "gelu_tanh" if size in _TANH else "gelu"
    return {"pool": "map", "activation": activation, "eps": 1e-6}


def _pe(size: str, grid: tuple[int, int]) -> dict[str, Any]:
    return {
        "pool": "map",
        "class_token": not size.startswith("gigantic"),
        "pool_heads": 8,
        "pool_mlp_dim": 4 * _PE[size.split("_")[0]][0],
        "pre_norm": True,
        "patch_bias": False,
        "rope": "pe",
        "rope_grid": grid,
    }


def _eva02(size: str, grid: tuple[int, int]) -> dict[str, Any]:
    rotated = {"rope": "eva02", "rope_grid": (16, 16), "inner_norms": True}
    return _EVA | rotated | {"gated": True, "activation": "silu"}


_EVA: dict[str, Any] = {"pool": "class", "eps": 1e-6, "key_bias": False}
_CLIP: dict[str, Any] = {"pool": "class", "pre_norm": True, "patch_bias": False}
_PE: dict[str, Sizes] = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "gigantic": (1536, 50, 16, 8960),
}
_CLIP_SIZES: dict[str, Sizes] = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
SIGLIP = Kind(
    "vit_{size}_patch{patch}_siglip_{side}",
    {
        "base": (768, 12, 12, 3072),
        "large": (1024, 24, 16, 4096),
        "so400m": (1152, 27, 16, 4304),
        "giantopt": (1536, 40, 16, 6144),
    },
    _siglip,
    _fused,
    _plain_mlp,
    projection="head",
    pixels=(HALF, HALF),
)
KINDS = (
    SIGLIP,
    Kind("vit_pe_core_{size}_patch{patch}_{side}", _PE, _pe, _fused, _plain_mlp),
    Kind(
        "eva02_{size}_patch{patch}_clip_{side}",
        {"base": (768, 12, 12, 2048), "large": (1024, 24, 16, 2730)},
        _eva02,
        _apart,
        _swiglu,
    ),
    Kind(
        "eva_{size}_patch{patch}_clip_{side}",
        {"giant": (1408, 40, 16, 6144)},
        lambda size, grid: _EVA,
        lambda: _fused(key_bias=False),
        _plain_mlp,
    ),
    Kind(
        "eva02_{size}_patch{patch}_clip_{side}",
        {"enormous": (1792, 64, 16, 15360)},
        lambda size, grid: _EVA | {"norms": "out"},
        lambda: _fused(key_bias=False),
        _plain_mlp,
    ),
    Kind(
        "vit_{size}_patch{patch}_clip_quickgelu_{side}",
        _CLIP_SIZES,
        lambda size, grid: _CLIP | {"activation": "quick_gelu"},
        _fused,
        _plain_mlp,
    ),
    Kind(
        "vit_{size}_patch{patch}_clip_{side}",
        _CLIP_SIZES,
        lambda size, grid: _CLIP,
        _fused,
        _plain_mlp,
    ),
)


def kind_named(name: str, where: str) -> tuple[Kind, tuple[str, int, int]]:
    """The kind of a name, and the size, patch size and pixels that it says.

    Raises:
      ClipjaxError: there is no such kind here.
    """
    for kind in KINDS:
        found = kind.match(name)
        if found is not None:
            return kind, found
    known = ", ".join(
        kind.name.format(size=size, patch="*", side="*") for kind in KINDS for size in kind.sizes
    )
    raise ClipjaxError(f"{where}: timm_model_name={name!r} is not supported here (only {known})")


def read_image(vision: dict[str, Any], description: Description, where: str, **pixels: Any) -> ViT:
    """The tower that a `vision_cfg` names, in the sizes of the weights."""
    kind, (size, patch, side) = kind_named(vision["timm_model_name"], where)
    tower = kind.tower(size, patch, side, **pixels)
    pool = "map" if tower.pool == "map" else "token"
    if vision.get("timm_pool", "avg") != pool:
        raise ClipjaxError(
            f"{where}: timm_pool={vision.get('timm_pool')!r} is not supported here with "
            f"{vision['timm_model_name']} (only {pool!r})"
        )
    if not description.shapes:
        return tower
    # They win: timm lets its callers change the sizes of a name.
    rows = description.shape(f"{_TRUNK}.pos_embed", 3)[1] - tower.has_class
    grid = family.side_of(rows, f"{_TRUNK}.pos_embed")
    first = f"{_TRUNK}.blocks.0.mlp"
    hidden = f"{first}.fc1_x.bias" if tower.gated else f"{first}.fc1.bias"
    sizes: dict[str, Any] = {
        "width": description.shape(f"{_TRUNK}.cls_token", 3)[2]
        if tower.has_class
        else description.shape(f"{_TRUNK}.pos_embed", 3)[2],
        "depth": description.layers(f"{_TRUNK}.blocks."),
        "mlp_dim": description.shape(hidden, 1)[0],
        "image_size": patch * grid,
    }
    if tower.pool_mlp_dim is not None:
        sizes["pool_mlp_dim"] = description.shape(f"{_TRUNK}.attn_pool.mlp.fc1.bias", 1)[0]
    return dataclasses.replace(tower, **sizes)


def read_projection(vision: dict[str, Any], where: str) -> str:
    """How the tower's vector comes to the embedding's width, by `DualEncoder`'s names."""
    kind = kind_named(vision["timm_model_name"], where)[0]
    said, bias = vision.get("timm_proj", "linear"), bool(vision.get("timm_proj_bias"))
    if said == "none":
        return "none"
    if not said and kind.projection == "trunk":
        return "affine"  # timm's own classifier, which has a bias
    if said == "linear" and (kind.projection == "head" or not bias):
        return "affine" if bias else "linear"
    raise ClipjaxError(
        f"{where}: timm_proj={said!r} with timm_proj_bias={bias} is not supported here for "
        f"{vision['timm_model_name']}"
    )


def rules(image: ViT, projection: str) -> list[Rule]:
    """All tensors of a tower and its projection."""
    kind = kind_of(image)
    places = (image.grid[0] * image.grid[1] + image.has_class, image.width)
    bias = image.patch_bias
    found = [
        *squeezed(f"{_TRUNK}.pos_embed", "image/positions", places),
        *patches(
            f"{_TRUNK}.patch_embed.proj", "image/patch", image.patch_size, image.width, bias=bias
        ),
        *norm(f"{_TRUNK}.norm_pre", "image/pre_norm") * image.pre_norm,
        *layered(
            [
                *norm(f"{_BLOCK}.norm1", f"{_OURS}/norm1"),
                *norm(f"{_BLOCK}.norm2", f"{_OURS}/norm2"),
                *kind.attention(),
                *kind.mlp(),
            ],
            range(image.depth),
        ),
        *norm(f"{_TRUNK}.norm", "image/norm"),
    ]
    if image.has_class:
        found += squeezed(f"{_TRUNK}.cls_token", "image/class_token", (image.width,), ones=2)
    if image.pool == "map":
        found += _pool(image)
    if projection == "affine" and kind.projection == "trunk":
        found += linear(f"{_TRUNK}.head", "image_projection")
    elif projection != "none":
        found += linear("visual.head.proj", "image_projection", bias=projection == "affine")
    return found


def _pool(image: ViT) -> list[Rule]:
    theirs, ours = f"{_TRUNK}.attn_pool", "image/pool"
    return [
        *squeezed(f"{theirs}.latent", f"{ours}/probe", (image.width,), ones=2),
        *linear(f"{theirs}.q", f"{ours}/attn/q"),
        *packed(f"{theirs}.kv.", [f"{ours}/attn/{x}" for x in "kv"]),
        *linear(f"{theirs}.proj", f"{ours}/attn/out"),
        *norm(f"{theirs}.norm", f"{ours}/norm"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]


_SEEN = ("pool", "has_class", "norms", "gated", "inner_norms", "rope", "patch_bias")


def is_timms(model: Any) -> bool:
    """Whether a model's image tower has what only timm's can have, of OpenCLIP's."""
    image = model.image
    if not isinstance(image, ViT):
        return False
    affine = getattr(model, "image_projection", None) == "affine"
    return image.pool == "map" or not image.key_bias or affine


def is_written_as_timms(model: Any) -> bool:
    """Whether an export takes timm's tower: a class token's ViT is OpenCLIP's own where timm has no such size."""
    if not is_timms(model):
        return False
    if model.image.pool == "map" or not model.image.key_bias:
        return True
    try:
        return bool(name_of(model.image))
    except ClipjaxError:
        return False


def kind_of(image: ViT) -> Kind:
    """The kind of a tower, by its arrangement."""
    for kind in KINDS:
        sample = kind.tower(next(iter(kind.sizes)), 1, 1)
        if sample.rope == "pe":  # of its sizes, one has no class token
            sample = dataclasses.replace(sample, class_token=image.class_token)
        seen = _SEEN if kind is SIGLIP else (*_SEEN, "activation")  # SigLIP's has two, by its size
        if all(getattr(sample, name) == getattr(image, name) for name in seen):
            return kind
    raise ClipjaxError("model.image: OpenCLIP has no tower of timm's of this arrangement")


def name_of(image: ViT) -> str:
    """timm's name of a tower.

    Raises:
      ClipjaxError: there is none of its arrangement and sizes.
    """
    kind, side = kind_of(image), family.square(image)
    for size, known in kind.sizes.items():
        if known == (image.width, image.depth, image.heads, image.hidden):
            name: str = kind.name.format(size=size, patch=image.patch_size, side=side)
            return name
    raise ClipjaxError(
        f"model.image: OpenCLIP's towers of this arrangement are timm's, and none has "
        f"width {image.width}, depth {image.depth}, heads {image.heads}, mlp_dim {image.hidden}"
    )


def describe(image: ViT, projection: str) -> dict[str, Any]:
    """What a `vision_cfg` says of a tower beside its image size."""
    facts: dict[str, Any] = {
        "timm_model_name": name_of(image),
        "timm_model_pretrained": False,
        "timm_pool": "map" if image.pool == "map" else "token",
    }
    if projection == "affine" and kind_of(image).projection == "trunk":
        return facts | {"timm_proj": None}
    facts["timm_proj"] = "none" if projection == "none" else "linear"
    if projection == "affine":
        facts["timm_proj_bias"] = True
    return facts
