"""The parts of a decoder layer: norms, projections, attention, the dense block.

Letters: B sequences, T positions of this call, S positions of the cache, D hidden size, H query heads, G key/value
heads.

Flax NNX declares the parameters, each with the names of its axes, and holds their maths. Rotary embeddings: Su et al.
2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import MoEConfig
from models.kv_cache import KVCache


def named(*axes: str | None) -> dict[str, Any]:
    """Make the metadata that names the axes of a parameter.

    Args:
        axes: names in `models.placement.AXES`; None for an axis that is never divided.

    Returns:
        Metadata of an `nnx.Param`; sharding is applied later, because a declaration has no mesh.
    """
    return {"out_sharding": axes, "eager_sharding": False}


def make_linear(inner: int, outer: int, axes: tuple[str | None, str | None], **options: Any) -> nnx.Linear:
    """Make a linear projection with named axes.

    Args:
        inner: size of the inputs.
        outer: size of the outputs.
        axes: names of the axes of the kernel [inner, outer]; a bias has the second one.
        options: of `nnx.Linear`.

    Returns:
        The layer.
    """
    return nnx.Linear(inner, outer, kernel_metadata=named(*axes), bias_metadata=named(axes[1]), **options)


class RMSNorm(nnx.Module):
    """Root mean square normalization over the last axis, computed in float32.

    Args:
        size: of the last axis.
        eps: added to the mean square.
        dtype: of the weight.
        axis: name of the weight's axis.
    """

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, axis: str | None = None):
        self.weight = nnx.Param(jnp.ones(size, dtype), **named(axis))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize.

        Args:
            x: [..., size].

        Returns:
            [..., size] in the dtype of `x`.
        """
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return jnp.expand_dims(self.weight[...], tuple(range(y.ndim - 1))) * y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads, rotary positions and an optional sliding window.

    Queries and keys are normalized, then clipped, then rotated, as far as the config asks for it.

    Args:
        config: the architecture.
        linear: makes a projection (`make_linear`).
        rngs: random numbers for the initialization.
        dtype: of the norms.
    """

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = partial(linear, use_bias=config.attention_bias, rngs=rngs)
        self.q_proj = linear(config.hidden_size, queries, (None, "heads"))
        self.k_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.v_proj = linear(config.hidden_size, keys, (None, "kv_heads"))
        self.o_proj = linear(queries, config.hidden_size, ("heads", None))
        norm = partial(RMSNorm, eps=config.rms_norm_eps, dtype=dtype)
        if config.query_key_norm == "head":
            self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        elif config.query_key_norm == "projection":
            self.q_norm, self.k_norm = norm(queries, axis="heads"), norm(keys, axis="kv_heads")
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        kv: KVCache | None,
        layer: int,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend.

        Args:
            x: [B, T, D].
            rotation: cosine and sine of `rotary_angles`.
            mask: bool[B, T, S], true where a query sees a key.
            kv: the cache with room for these positions (`models.kv_cache.extend`); None: `x` is a whole text.
            layer: position among all layers.

        Returns:
            [B, T, D], and the cache with this layer's keys and values.
        """
        batch, length, _ = x.shape
        with jax.named_scope("projections"):
            queries, keys, values = self.project(x)
        with jax.named_scope("norms"):
            queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        with jax.named_scope("scores"):
            if kv is None:
                out = attend_causally(queries, keys, values, mask)
            else:
                kv = kv.store(layer, keys, values)
                out = attend(queries, kv.keys[layer], kv.values[layer], mask)
        with jax.named_scope("projections"):
            return self.o_proj(out.reshape(batch, length, -1)), kv

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute queries, keys and values before rotation.

        Args:
            x: [B, T, D].

        Returns:
            Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim].
        """
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


class MLP(nnx.Module):
    """The SwiGLU block of a layer without experts.

    Args:
        config: the architecture.
        linear: makes a projection (`make_linear`).
        rngs: random numbers for the initialization.
    """

    def __init__(self, config: MoEConfig, linear: Any, rngs: nnx.Rngs):
        self.gate_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.up_proj = linear(config.hidden_size, config.dense_size, (None, "dense_size"), rngs=rngs)
        self.down_proj = linear(config.dense_size, config.hidden_size, ("dense_size", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Run the block.

        Args:
            x: [..., D].

        Returns:
            [..., D].
        """
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


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


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply the rotary embedding; the first half of a head is paired with the second, as in Hugging Face's checkpoints.

    Args:
        x: [B, T, heads, head_dim].
        cos: [B, T, 1, head_dim].
        sin: [B, T, 1, head_dim].

    Returns:
        [B, T, heads, head_dim].
    """
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute scaled dot-product attention.

    Args:
        queries: [B, T, H, head_dim].
        keys: [B, S, G, head_dim].
        values: [B, S, G, head_dim].
        mask: bool[B, T, S], true where a query sees a key.

    Returns:
        [B, T, H, head_dim].
    """
    with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 with float32 on the way
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None])


def attend_causally(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute attention over a whole text, S = T, where no query sees a later key.

    Queries are processed in at most 8 blocks of at least 64, each with the keys up to its own end, so nearly half of
    the scores are never computed.

    Args:
        queries: [B, T, H, head_dim].
        keys: [B, T, G, head_dim].
        values: [B, T, G, head_dim].
        mask: bool[B, T, T], true where a query sees a key.

    Returns:
        [B, T, H, head_dim].
    """
    length = queries.shape[1]
    size = max(-(-length // 8), 64)
    blocks = [
        attend(queries[:, start:end], keys[:, :end], values[:, :end], mask[:, start:end, :end])
        for start in range(0, length, size)
        for end in [min(start + size, length)]
    ]
    return jnp.concatenate(blocks, axis=1)
