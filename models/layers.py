"""The modules of the decoder: norms, projections, the dense block; attention is in `models.attention`.

Letters: B sequences, T positions of this call, S positions of the cache, D hidden size, H query heads, G key/value
heads, V vocabulary.

Flax NNX declares the parameters, each with the names of its axes, and holds their computation; what runs is a pure
function of a plain dict (`with_methods`). Rotary embeddings: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Sight
from models.config import MoEConfig
from models.kv_cache import KVCache

# Products whose result is compared or goes through a softmax stay in float32 when weights and inputs are bfloat16:
# rounded to 8 bits, close experts or tokens tie or change places.
_TO_FLOAT32: dict[str, Any] = {"preferred_element_type": jnp.float32}


def _named(*axes: str | None) -> dict[str, Any]:
    """Metadata with the names of a parameter's axes (`models.placement.AXES`); None: an axis that is never divided."""
    return {"out_sharding": axes, "eager_sharding": False}  # sharding is applied later: a declaration has no mesh


def _product(
    x: jax.Array, kernel: jax.Array, axes: Any, preferred_element_type: Any = None, **options: Any
) -> jax.Array:
    """`lax.dot_general` that adds in float32 and then rounds."""

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, kernel, axes, **_TO_FLOAT32, **options)

    if x.size == x.shape[-1]:  # one token
        wide = jax.lax.platform_dependent(x, kernel, cuda=partial(_of_two, product), default=product)
    else:
        wide = product(x, kernel)
    return wide.astype(preferred_element_type or x.dtype)


def _of_two(product: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product for one token [..., D], computed with a second row of zeros.

    For one row, XLA writes all elementwise products to memory before it adds them up. For two, it uses the same kernels
    as for more, which compute at least 16 rows, and does so once for all projections of the token.
    """
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])
    return product(padded, kernel)[..., :1, :]


def _linear(inner: int, outer: int, axes: tuple[str | None, str | None], **options: Any) -> nnx.Linear:
    """A projection whose kernel [inner, outer] has axes of these names; a bias has the second one."""
    names = {"kernel_metadata": _named(*axes), "bias_metadata": _named(axes[1])}
    return nnx.Linear(inner, outer, dot_general=_product, **names, **options)


class _RMSNorm(nnx.Module):
    """Root mean square normalization over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, axis: str | None = None):
        self.weight = nnx.Param(jnp.ones(size, dtype), **_named(axis))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return jnp.expand_dims(self.weight[...], tuple(range(y.ndim - 1))) * y.astype(x.dtype)


class _Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads, rotary positions and an optional sliding window.

    Queries and keys are normalized, then clipped, then rotated, as far as the config asks for it.
    """

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = partial(linear, use_bias=config.attention_bias, rngs=rngs)
        self.q_proj = linear(config.hidden_size, queries, (None, "heads"))
        self.k_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.v_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.o_proj = linear(queries, config.hidden_size, ("heads", None))
        norm = partial(_RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        if config.query_key_norm == "head":
            self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        elif config.query_key_norm == "projection":
            self.q_norm, self.k_norm = norm(queries, axis="heads"), norm(keys, axis="kv_heads")
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        sight: Sight,
        kv: KVCache | None,
        layer: int,
        attend: Callable[..., jax.Array],
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] for `x` [B, T, D], and the cache with this layer's keys and values; `layer` counts all layers."""
        batch, length, _ = x.shape
        with jax.named_scope("projections"):
            queries, keys, values = self._project(x)
        with jax.named_scope("norms"):
            queries, keys = _rotate(queries, *rotation), _rotate(keys, *rotation)
        with jax.named_scope("scores"):
            keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # [B, G, T, head_dim]
            if kv is not None:
                kv = kv.store(layer, keys, values)
                keys, values = kv.keys[layer], kv.values[layer]
            out = attend(queries, keys, values, sight)
        with jax.named_scope("projections"):
            return self.o_proj(out.reshape(batch, length, -1)), kv

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim], not yet rotated."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.query_key_norm == "projection":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = queries.reshape(heads), keys.reshape(heads), values.reshape(heads)
        if self.config.query_key_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if (most := self.config.clip_qkv) is not None:
            queries, keys, values = (jnp.clip(one, -most, most) for one in (queries, keys, values))
        return queries, keys, values


class _MLP(nnx.Module):
    """The SwiGLU block of a layer without experts."""

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs):
        self.gate_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.up_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.down_proj = linear(config.dense_size, config.hidden_size, ("dense_size", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class _DecoderLayer(nnx.Module):
    """Attention and what comes before the experts; `mlp` replaces the gate in a layer without experts."""

    def __init__(self, config: MoEConfig, place: int, linear: Any, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_norm = _RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = _Attention(config, linear, rngs, dtype)
        self.expert_norm = _RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if place in config.dense_layers:
            self.mlp = _MLP(config, linear, rngs)
        else:
            self.gate = linear(config.hidden_size, config.num_experts, (None, None), **_TO_FLOAT32, rngs=rngs)


class Decoder(nnx.Module):
    """Everything but the experts: embedding, layers with attention and gate, final norm and head.

    Args:
        config: the architecture.
        dtype: of the parameters.
        rngs: random numbers for the initialization.
    """

    def __init__(self, config: MoEConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        linear = partial(_linear, use_bias=False, param_dtype=dtype, kernel_init=init)
        embed = partial(nnx.Embed, param_dtype=dtype, embedding_init=init)
        axes = _named("vocabulary", None)
        self.embed = embed(config.vocab_size, config.hidden_size, embedding_metadata=axes, rngs=rngs)
        self.layers = nnx.List([_DecoderLayer(config, place, linear, dtype, rngs) for place in range(config.depth)])
        self.norm = _RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, (None, "vocabulary"), **_TO_FLOAT32, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        """Compute the logits of hidden states.

        Args:
            x: [..., D], after the final norm.

        Returns:
            float32[..., V] over the vocabulary.
        """
        if hasattr(self, "head"):
            return self.head(x)
        return jnp.einsum("...d,vd->...v", x, self.embed.embedding[...], **_TO_FLOAT32)


def with_methods(config: MoEConfig, decoder: dict[str, Any]) -> Decoder:
    """Give the parameters of a decoder the methods of its layers.

    Args:
        config: the architecture.
        decoder: the entry "decoder" of the parameters.

    Returns:
        The `Decoder` with these parameters.
    """
    return nnx.merge(_structure(config, decoder["embed"]["embedding"].dtype), decoder)


@lru_cache(maxsize=16)
def _structure(config: MoEConfig, dtype: jnp.dtype) -> Any:
    # With the dtype of the parameters, because an embedding keeps its dtype as part of the structure.
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype, nnx.Rngs(0))))[0]


def rotary_angles(positions: jax.Array, config: MoEConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Compute the rotary angles in float32.

    Args:
        positions: int32[B, T].
        config: the architecture.
        dtype: of the result.

    Returns:
        Cosine and sine, [B, T, 1, head_dim] each.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) / (config.rope_theta**exponents)[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x` [B, T, heads, head_dim]; the halves of a head are paired, as in Hugging Face's files."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
