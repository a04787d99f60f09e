"""Text towers of Hugging Face: XLM-RoBERTa, jina-embeddings v3, T5 and mT5 encoders, ModernBERT, Gemma.

Each becomes a model of one tower, for a run to start from (`Pretrained.tower`), frozen or trained. What
stands around the tower in a checkpoint (heads, poolers, decoders) is left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clipjax.data import Resize
from clipjax.errors import ClipjaxError
from clipjax.interop import family
from clipjax.interop.family import Description, Family, Tensors
from clipjax.interop.huggingface import CONFIG, activation, special_tokens
from clipjax.interop.huggingface_fields import GENERIC
from clipjax.interop.table import Rule, Table, layered, linear, norm, packed, same
from clipjax.models import Encoder, MultiEncoder
from clipjax.models.base import tower_of
from clipjax.towers import TextTransformer

LONGEST = 512
"""Tokens of a text at most, where the weights would take more: rows are padded to it."""
_BLOCKS = "text/blocks"
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One architecture of transformers.

    Attributes:
      name: as messages call it.
      types: its model_type in config.json.
      prefixes: what may stand before every name.
      ignored: patterns of the names that are no part of the tower.
      known: what a config.json may say, beside what every one does.
      tower: reads the architecture.
      layer: the rules of a layer, `{i}` for its number.
      rules: those outside the layers.
      adapted: tensors as the rules need them.
      bos: whether its tokenizer begins a text with a token.
      ends: whether it ends one with a token.
    """

    name: str
    types: tuple[str, ...]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
    known: dict[str, tuple[Any, ...]]
    tower: Callable[[Config], TextTransformer]
    layer: Callable[[TextTransformer], list[Rule]]
    rules: Callable[[TextTransformer], list[Rule]]
    adapted: Callable[[Tensors, Config], Tensors] = lambda tensors, config: tensors
    bos: bool = True
    ends: bool = True


def _any(*names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names, family.ANY)


def _float32(tensor: Any) -> np.ndarray:
    return np.asarray(tensor).astype(np.float32)


def _sizes(config: Config, where: str = CONFIG) -> dict[str, Any]:
    names = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    sizes = {ours: family.field(config, theirs, where) for ours, theirs in names.items()}
    return sizes | _special(config)


def _special(config: Config) -> dict[str, Any]:
    eos = config.get("eos_token_id", 1)
    return {
        "pad_id": family.field(config, "pad_token_id", CONFIG),
        "eos_id": eos[0] if isinstance(eos, list) else (1 if eos is None else eos),
    }


def _theta(config: Config, kind: str, old: str, default: float) -> float:
    """Base of rotations: of a kind of layers, or of all; older files have it under a name of its own."""
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get(kind) or parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        parameters = {}
    known: dict[str, tuple[Any, ...]] = {
        "rope_type": ("default",),
        "rope_theta": family.ANY,
        "type": ("default",),
    }
    family.refuse_unknown(parameters, f"{CONFIG}: rope_parameters", **known)
    return float(parameters.get("rope_theta") or config.get(old) or default)


# XLM-RoBERTa and jina-embeddings v3


def _bert(config: Config) -> dict[str, Any]:
    return _sizes(config) | {
        "activation": activation(config.get("hidden_act", "gelu"), "hidden_act"),
        "eps": float(config.get("layer_norm_eps", 1e-12)),
        "norms": "post",
        "embed_norm": True,
        "final_norm": False,
        "causal": False,
        "pool": "mean",
    }


def _xlm_roberta(config: Config) -> TextTransformer:
    longest = family.field(config, "max_position_embeddings", CONFIG)
    # The first positions are padding's, and of what comes before it.
    return TextTransformer(context_length=longest - config["pad_token_id"] - 1, **_bert(config))


def _jina(config: Config) -> TextTransformer:
    longest = config.get("max_position_embeddings", 8194)
    fields = {"context_length": min(longest, LONGEST), "positions": "rotary"}
    theta = _theta(config, "full_attention", "rope_theta", 20_000.0)
    return TextTransformer(rope_theta=theta, **fields, **_bert(config))


def _one_type(tensors: Tensors, config: Config) -> Tensors:
    """All tokens are of the first type, whose vector goes into theirs."""
    tensors = dict(tensors)
    types = tensors.pop("embeddings.token_type_embeddings.weight", None)
    words, places = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    if types is not None and words in tensors:
        tensors[words] = _float32(tensors[words]) + _float32(types)[0]
    if places in tensors:
        tensors[places] = tensors[places][config["pad_token_id"] + 1 :]
    return tensors


def _xlm_roberta_layer(tower: TextTransformer) -> list[Rule]:
    layer = "encoder.layer.{i}"
    names = {"query": "q", "key": "k", "value": "v"}
    rules = [
        *linear(f"{layer}.attention.output.dense", f"{_BLOCKS}/attn/out"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{_BLOCKS}/norm1"),
        *linear(f"{layer}.intermediate.dense", f"{_BLOCKS}/mlp/fc1"),
        *linear(f"{layer}.output.dense", f"{_BLOCKS}/mlp/fc2"),
        *norm(f"{layer}.output.LayerNorm", f"{_BLOCKS}/norm2"),
    ]
    for theirs, ours in names.items():
        rules += linear(f"{layer}.attention.self.{theirs}", f"{_BLOCKS}/attn/{ours}")
    return rules


def _jina_layer(tower: TextTransformer) -> list[Rule]:
    layer = "layers.{i}"
    rules = [
        *linear(f"{layer}.self_attn.o_proj", f"{_BLOCKS}/attn/out"),
        *norm(f"{layer}.post_attention_layernorm", f"{_BLOCKS}/norm1"),
        *linear(f"{layer}.mlp.fc1", f"{_BLOCKS}/mlp/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{_BLOCKS}/mlp/fc2"),
        *norm(f"{layer}.post_mlp_layernorm", f"{_BLOCKS}/norm2"),
    ]
    for x in "qkv":
        rules += linear(f"{layer}.self_attn.{x}_proj", f"{_BLOCKS}/attn/{x}")
    return rules


def _bert_rules(tower: TextTransformer) -> list[Rule]:
    learned = tower.positions == "learned"
    return [
        *same("embeddings.word_embeddings.weight", "text/embedding"),
        *same("embeddings.position_embeddings.weight", "text/positions") * learned,
        *norm("embeddings.LayerNorm", "text/embed_norm"),
    ]


_BERT_FIELDS = _any(
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
) | {"position_embedding_type": ("absolute",)}
_BERT_REST = (r"pooler\..*", r"lm_head\..*", r"classifier\..*", r"embeddings\.position_ids")


# T5


def _t5(config: Config) -> TextTransformer:
    gated, _, name = config.get("feed_forward_proj", "relu").rpartition("-")
    if gated not in ("", "gated"):
        raise ClipjaxError(f"{CONFIG}: feed_forward_proj={config['feed_forward_proj']!r}")
    # transformers takes the approximation for "gated-gelu", as T5 1.1 was trained with it.
    name = "gelu_new" if (gated, name) == ("gated", "gelu") else name
    return TextTransformer(
        width=family.field(config, "d_model", CONFIG),
        depth=family.field(config, "num_layers", CONFIG),
        heads=family.field(config, "num_heads", CONFIG),
        head_dim=family.field(config, "d_kv", CONFIG),
        mlp_dim=family.field(config, "d_ff", CONFIG),
        vocab_size=family.field(config, "vocab_size", CONFIG),
        context_length=LONGEST,
        gated=bool(gated),
        activation=activation(name, "feed_forward_proj"),
        norm="rmsnorm",
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
        qkv_bias=False,
        out_bias=False,
        attention_scale=1.0,
        positions="relative",
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_distance=config.get("relative_attention_max_distance", 128),
        causal=False,
        pool="mean",
        **_special(config),
    )


def _t5_layer(tower: TextTransformer) -> list[Rule]:
    attn, mlp = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    rules = [
        *same(f"{attn}.layer_norm.weight", f"{_BLOCKS}/norm1/scale"),
        *linear(f"{attn}.SelfAttention.o", f"{_BLOCKS}/attn/out", bias=False),
        *same(f"{mlp}.layer_norm.weight", f"{_BLOCKS}/norm2/scale"),
        *linear(f"{mlp}.DenseReluDense.wo", f"{_BLOCKS}/mlp/fc2", bias=False),
    ]
    for x in "qkv":
        rules += linear(f"{attn}.SelfAttention.{x}", f"{_BLOCKS}/attn/{x}", bias=False)
    maps = {"wi_0": "gate", "wi_1": "fc1"} if tower.gated else {"wi": "fc1"}
    for theirs, ours in maps.items():
        rules += linear(f"{mlp}.DenseReluDense.{theirs}", f"{_BLOCKS}/mlp/{ours}", bias=False)
    return rules


def _t5_rules(tower: TextTransformer) -> list[Rule]:
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        *same("shared.weight", "text/embedding"),
        *same(first, "text/distances"),
        *same("encoder.final_layer_norm.weight", "text/norm/scale"),
    ]


def _t5_shared(tensors: Tensors, config: Config) -> Tensors:
    """The token embeddings under their one name: files repeat them, or have the encoder's alone."""
    tensors = dict(tensors)
    own = tensors.pop("encoder.embed_tokens.weight", None)
    return tensors if own is None else tensors | {"shared.weight": own}


# ModernBERT and Gemma: rotations, and windows in some layers


def _windows(config: Config, window: int) -> dict[str, Any]:
    names = {"full_attention": "g", "sliding_attention": "l"}
    types = config["layer_types"]
    unknown = sorted(set(types) - set(names))
    if unknown:
        raise ClipjaxError(f"{CONFIG}: layer_types names {unknown[0]!r}, which is not known here")
    pattern = "".join(names[one] for one in types)
    return {} if "l" not in pattern else {"window": window, "window_layers": pattern}


def _pattern(config: Config, every: int, first: int) -> Config:
    """With `layer_types`, which older files say by a period alone."""
    if config.get("layer_types"):
        return config
    types = [
        "full_attention" if (i + first) % every == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]
    return {**config, "layer_types": types}


def _modernbert(config: Config) -> TextTransformer:
    config = _pattern(config, config.get("global_attn_every_n_layers", 3), 0)
    named = config.get("hidden_activation", "gelu")
    return TextTransformer(
        context_length=min(config.get("max_position_embeddings", 8192), LONGEST),
        activation=activation(named, "hidden_activation"),
        gated=True,
        norm="layernorm_no_bias",
        bare_first=True,
        embed_norm=True,
        eps=float(config.get("norm_eps", 1e-5)),
        qkv_bias=False,
        out_bias=False,
        positions="rotary",
        rope_theta=_theta(config, "full_attention", "global_rope_theta", 160_000.0),
        window_theta=_theta(config, "sliding_attention", "local_rope_theta", 10_000.0),
        causal=False,
        pool="mean",
        **_windows(config, config.get("local_attention", 128) // 2),
        **_sizes(config),
    )


def _modernbert_layer(tower: TextTransformer) -> list[Rule]:
    layer = "layers.{i}"
    qkv = [f"{_BLOCKS}/attn/{x}" for x in "qkv"]
    return [
        *same(f"{layer}.attn_norm.weight", f"{_BLOCKS}/norm1/scale"),
        *packed(f"{layer}.attn.Wqkv.", qkv)[:1],
        *linear(f"{layer}.attn.Wo", f"{_BLOCKS}/attn/out", bias=False),
        *same(f"{layer}.mlp_norm.weight", f"{_BLOCKS}/norm2/scale"),
        *packed(f"{layer}.mlp.Wi.", [f"{_BLOCKS}/mlp/gate", f"{_BLOCKS}/mlp/fc1"])[:1],
        *linear(f"{layer}.mlp.Wo", f"{_BLOCKS}/mlp/fc2", bias=False),
    ]


def _modernbert_rules(tower: TextTransformer) -> list[Rule]:
    return [
        *same("embeddings.tok_embeddings.weight", "text/embedding"),
        *same("embeddings.norm.weight", "text/embed_norm/scale"),
        *same("final_norm.weight", "text/norm/scale"),
    ]


def _first_norm(tensors: Tensors, config: Config) -> Tensors:
    """The first layer's norm, which is not there, as ones: it is not used (`bare_first`)."""
    ones = np.ones(config["hidden_size"], np.float32)
    return {"layers.0.attn_norm.weight": ones, **tensors}


def _gemma(config: Config) -> TextTransformer:
    third = config.get("model_type") == "gemma3_text"
    two_ways = bool(config.get("use_bidirectional_attention"))
    head_dim = config.get("head_dim", 256)
    scale = float(config.get("query_pre_attn_scalar", 256)) if third else float(head_dim)
    named = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    # The exact GELU of Gemma's first configurations was a mistake, and means the approximation.
    named = "gelu_pytorch_tanh" if named == "gelu" and not third else named
    fields: dict[str, Any] = {}
    if third:
        config = _pattern(config, config.get("sliding_window_pattern", 6), 1)
        window = config.get("sliding_window", 4096)
        # The number is of all that is seen: the token itself too in one direction, both sides in two.
        window = window // 2 if two_ways else window - 1
        fields = _windows(config, window) | {"norms": "both", "qk_norm": True}
        if fields.get("window"):
            local = _theta(config, "sliding_attention", "rope_local_base_freq", 10_000.0)
            fields["window_theta"] = local
    return TextTransformer(
        context_length=min(config.get("max_position_embeddings", 8192), LONGEST),
        kv_heads=family.field(config, "num_key_value_heads", CONFIG),
        head_dim=head_dim,
        attention_scale=1 / math.sqrt(scale),
        activation=activation(named, "hidden_activation"),
        gated=True,
        norm="rmsnorm",
        eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=False,
        out_bias=False,
        embed_scale=True,
        positions="rotary",
        rope_theta=_theta(config, "full_attention", "rope_theta", 1e6 if third else 1e4),
        causal=not two_ways,
        pool="mean" if two_ways else "last",
        **fields,
        **_sizes(config),
    )


def _gemma_layer(tower: TextTransformer) -> list[Rule]:
    layer, both = "layers.{i}", tower.norms == "both"
    norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    if both:
        norms = {
            "input_layernorm": "norm1",
            "post_attention_layernorm": "norm1_out",
            "pre_feedforward_layernorm": "norm2",
            "post_feedforward_layernorm": "norm2_out",
            "self_attn.q_norm": "attn/q_norm",
            "self_attn.k_norm": "attn/k_norm",
        }
    rules = []
    for theirs, ours in norms.items():
        rules += same(f"{layer}.{theirs}.weight", f"{_BLOCKS}/{ours}/scale")
    maps = {f"self_attn.{x}_proj": f"attn/{x}" for x in "qkv"}
    maps |= {"self_attn.o_proj": "attn/out", "mlp.gate_proj": "mlp/gate"}
    maps |= {"mlp.up_proj": "mlp/fc1", "mlp.down_proj": "mlp/fc2"}
    for theirs, ours in maps.items():
        rules += linear(f"{layer}.{theirs}", f"{_BLOCKS}/{ours}", bias=False)
    return rules


def _gemma_rules(tower: TextTransformer) -> list[Rule]:
    return [
        *same("embed_tokens.weight", "text/embedding"),
        *same("norm.weight", "text/norm/scale"),
    ]


def _from_one(tensors: Tensors, config: Config) -> Tensors:
    """Gemma's norms multiply by one more than what is stored."""
    return {
        name: _float32(tensor) + 1 if name.endswith("norm.weight") else tensor
        for name, tensor in tensors.items()
    }


_ROPE = _any("rope_parameters", "rope_theta") | {"rope_scaling": (None,)}
_DECODER_FIELDS = (
    _ROPE
    | _any(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("vocab_size", "max_position_embeddings", "head_dim", "num_key_value_heads", "hidden_act"),
        *("hidden_activation", "rms_norm_eps", "attention_dropout", "use_bidirectional_attention"),
        *("final_logit_softcapping", "cache_implementation"),  # of the words it predicts
    )
    | {"attention_bias": (False,)}
)
KINDS = (
    Kind(
        "XLM-RoBERTa",
        ("xlm-roberta", "roberta"),
        ("roberta.",),
        _BERT_REST,
        _BERT_FIELDS,
        _xlm_roberta,
        _xlm_roberta_layer,
        _bert_rules,
        _one_type,
    ),
    Kind(
        "jina-embeddings v3",
        ("jina_embeddings_v3",),
        ("roberta.",),
        _BERT_REST,
        _BERT_FIELDS | _ROPE,
        _jina,
        _jina_layer,
        _bert_rules,
        _one_type,
    ),
    Kind(
        "T5's encoder",
        ("mt5", "t5"),
        (),
        (r"decoder\..*", r"lm_head\..*"),
        _any(
            *("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
            *("relative_attention_num_buckets", "relative_attention_max_distance", "vocab_size"),
            *("dropout_rate", "layer_norm_epsilon", "feed_forward_proj", "classifier_dropout"),
            *("dense_act_fn", "is_gated_act", "n_positions", "output_past"),
        ),
        _t5,
        _t5_layer,
        _t5_rules,
        _t5_shared,
        bos=False,
    ),
    Kind(
        "ModernBERT",
        ("modernbert",),
        ("model.",),
        (r"head\..*", r"decoder\..*", r"classifier\..*"),
        _ROPE
        | _any(
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("vocab_size", "max_position_embeddings", "norm_eps", "hidden_activation"),
            *("layer_types", "local_attention", "global_attn_every_n_layers"),
            *("global_rope_theta", "local_rope_theta", "cls_token_id", "initializer_cutoff_factor"),
            *("embedding_dropout", "mlp_dropout", "attention_dropout", "decoder_bias"),
            *("classifier_pooling", "classifier_dropout", "classifier_bias"),
            *("classifier_activation", "deterministic_flash_attn", "sparse_prediction"),
            *("sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad"),
            *(
                "layer_norm_eps",
                "position_embedding_type",
            ),  # of files that say them and read neither
        )
        | {"attention_bias": (False,), "mlp_bias": (False,), "norm_bias": (False,)},
        _modernbert,
        _modernbert_layer,
        _modernbert_rules,
        _first_norm,
    ),
    Kind(
        "Gemma",
        ("gemma", "gemma3_text"),
        ("model.", "language_model."),
        (r"lm_head\..*",),
        _DECODER_FIELDS
        | _any("query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "layer_types")
        | _any("_sliding_window_pattern", "rope_local_base_freq")
        | {"attn_logit_softcapping": (None,)},
        _gemma,
        _gemma_layer,
        _gemma_rules,
        _from_one,
        ends=False,
    ),
)


def _family(kind: Kind) -> Family:
    def config_of(files: Mapping[str, Any]) -> Config:
        return files.get(CONFIG, {})

    def claims(description: Description) -> bool:
        return config_of(description.files).get("model_type") in kind.types

    def adapt(tensors: Tensors, files: Mapping[str, Any]) -> Tensors:
        config = config_of(files)
        found = dict(tensors)
        for prefix in kind.prefixes:
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        rest = re.compile("|".join(f"(?:{pattern})" for pattern in kind.ignored))
        found = {name: t for name, t in found.items() if not rest.fullmatch(name)}
        # Of one tower alone nothing is compared: the scale is where CLIP's starts.
        scale = np.full((), math.log(1 / 0.07), np.float32)
        return {**kind.adapted(found, config), "logit_scale": scale}

    def model(description: Description) -> MultiEncoder:
        config = config_of(description.files)
        family.refuse_unknown(config, CONFIG, **(GENERIC | kind.known))
        tower = kind.tower(config)
        return MultiEncoder((Encoder("text", tower, "none"),), embed_dim=tower.width)

    def table(model: Any) -> Table:
        tower = tower_of(model, "text")
        layers = layered(kind.layer(tower), range(tower.depth))
        return Table((*same("logit_scale", "logit_scale"), *kind.rules(tower), *layers))

    def tokens(description: Description) -> dict[str, Any]:
        found: dict[str, Any] = special_tokens(description) | {"clean": "keep"}
        config = description.files.get("tokenizer_config.json", {})
        for role, other in (("bos", "cls"), ("eos", "sep")):
            if found[role] is None and f"{other}_token" in config:
                named = config[f"{other}_token"]
                found[role] = named.get("content") if isinstance(named, dict) else named
        found["ends"] = kind.ends
        return found if kind.bos else found | {"bos": ""}

    return Family(
        name=f"Hugging Face's {kind.name}",
        models=(MultiEncoder,),
        image_towers=(),
        weights_file="model.safetensors",
        claims=claims,
        model=model,
        table=table,
        nearest=lambda model: model,
        describe=lambda pretrained: {},
        resize=lambda description: Resize(),
        tokens=tokens,
        adapt=adapt,
    )


FAMILIES = tuple(map(_family, KINDS))
