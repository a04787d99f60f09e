"""generate: from what a picture became to tokens; and the same compiled, from pixels on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from clipjax.data.tokenizers import TokenizerModel
from clipjax.errors import ClipjaxError
from clipjax.generation.decoder import Cached, Captioner, Uncached
from clipjax.generation.greedy import Greedy
from clipjax.generation.strategy import Generated, SpecialTokens, Strategy, Task
from clipjax.mesh import replicated
from clipjax.params import merge


def generate(
    module: Captioner,
    memory: jax.Array,
    strategy: Strategy = Greedy(),  # noqa: B008 (frozen)
    *,
    special: SpecialTokens,
    prompt: jax.Array,
    prompt_length: jax.Array,
    seed: int | jax.Array = 0,
    rows: jax.Array | None = None,
    use_cache: bool = True,
    mesh: Mesh | None = None,
) -> Generated:
    """Completes prompts, inside `jax.jit` or outside.

    Neither the batch that a picture is in nor the mesh changes its caption, up to what float32
    rounding does to ties.

    Args:
      module: the model.
      memory: [B, Q, D], what `module.caption_memory` made.
      strategy: how tokens are chosen.
      special: the tokens that are no text.
      prompt: int32 [B, L], rows `bos, prompt..., pad...`; L is the greatest length of a caption.
      prompt_length: int32 [B], tokens given, bos counted; from 1 to L - 1.
      seed: for strategies that draw.
      rows: int32 [B], numbers that the rows draw by; default: 0, 1, ...
      use_cache: False runs the whole row again at every position, for comparison.
      mesh: what the rows are split over, if they are; B is a multiple of its batch shards.
    """
    rows = jnp.arange(len(memory)) if rows is None else rows
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    decoder = (Cached if use_cache else Uncached)(module, memory)
    return strategy.search(Task(decoder, prompt, prompt_length, keys, special, mesh))


def compiled(
    graphdef: nnx.GraphDef, strategy: Strategy, special: SpecialTokens, mesh: Mesh | None = None
) -> Callable[..., Generated]:
    """`function(params, model_state, (image, prompt, prompt_length, row), seed) -> Generated`.

    Args:
      graphdef: static structure of the model.
      strategy: how tokens are chosen.
      special: the tokens that are no text.
      mesh: what the rows are split over; every device gets all captions.
    """

    def caption(params, model_state, batch, seed):
        module = merge(graphdef, params, model_state)
        require_decoder(module)
        image, prompt, prompt_length, row = batch
        return generate(
            module,
            module.caption_memory(image),
            strategy,
            special=special,
            prompt=prompt,
            prompt_length=prompt_length,
            seed=seed,
            rows=row,
            mesh=mesh,
        )

    # None: wherever the parameters are.
    return jax.jit(caption, out_shardings=None if mesh is None else replicated(mesh))


def require_decoder(module: nnx.Module) -> None:
    """Refuses a model that writes no captions.

    Raises:
      ClipjaxError: it has no decoder; the message says what kind of model it is.
    """
    if not hasattr(module, "caption_memory"):
        kind = type(getattr(module, "config", module)).__name__
        raise ClipjaxError(
            f"the model, of the kind {kind}, has no captioning decoder: train or open one that has, "
            "such as a CoCa"
        )


def special_tokens(tokenizer: TokenizerModel) -> SpecialTokens:
    """The tokenizer's tokens that are no text."""
    return SpecialTokens(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def row_length(strategy: Strategy, special: SpecialTokens, context_length: int) -> int:
    """Tokens of a row: as many as the model's texts have, or fewer where the strategy says so.

    Raises:
      ClipjaxError: the strategy asks for more than the model has.
    """
    beginning = 0 if special.bos is None else 1
    if strategy.max_length is None:
        length = context_length
    elif strategy.max_length + beginning > context_length:
        raise ClipjaxError(
            f"{type(strategy).__name__}: max_length={strategy.max_length} is more than the "
            f"{context_length - beginning} tokens that this model's captions can have"
        )
    else:
        length = strategy.max_length + beginning
    if strategy.min_length > length - beginning - 1:
        raise ClipjaxError(
            f"{type(strategy).__name__}: min_length={strategy.min_length} leaves no room for the end "
            f"token within the {length - beginning} tokens of a caption"
        )
    return length


def prompt_rows(
    tokenizer: TokenizerModel, prompt: str | Sequence[str], count: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens.

    White space at a prompt's end is dropped: tokenizers keep it with the word that follows.

    Args:
      tokenizer: the model's.
      prompt: how all captions begin, or how each of them does.
      count: n, the captions.
      length: L, tokens of a row.

    Returns:
      (rows int32 [n, L] `bos, prompt..., pad...`, how many tokens of each are given int32 [n]).

    Raises:
      ClipjaxError: not one prompt a picture, or a prompt leaves no room, or there is nothing to
        begin with.
    """
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ClipjaxError(f"{len(prompts)} prompts for {count} pictures: give one, or one each")
    places = {text: i for i, text in enumerate(dict.fromkeys(p.rstrip() for p in prompts))}
    # More than fits, so that a prompt that is too long shows.
    tokens = tokenizer.encode(list(places), length + 2)
    given = (tokens != tokenizer.eos_id).cumprod(axis=1).sum(axis=1)
    for text, used in zip(places, given.tolist(), strict=True):
        if used >= length:
            raise ClipjaxError(
                f"the prompt {text!r} leaves no room in captions of {length} tokens (bos and end "
                "counted): shorten it, or raise max_length"
            )
        if used < 1:
            raise ClipjaxError(
                "this model's tokenizer has no token to begin a caption with: give a prompt"
            )
    tokens = np.where(np.arange(length + 2) < given[:, None], tokens, tokenizer.pad_id)
    index = [places[p.rstrip()] for p in prompts]
    return tokens[index, :length].astype(np.int32), given[index].astype(np.int32)
