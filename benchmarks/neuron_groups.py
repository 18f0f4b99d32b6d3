"""Split the only expert of each layer into groups of neurons that are active together.

Every group becomes an expert and all of them run (K = E), so the model computes the same as before. Neurons are grouped
by co-activation, as in MoEfication (Zhang et al. 2022, arXiv 2110.01786), so that a token needs few of the groups.

Letters: L layers, N tokens, D hidden size, F neurons of a layer, G groups, S = F / G neurons of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from analysis.text.batches import batches
from analysis.text.encoding import Encoded
from models import MoEConfig
from models.decoder import Network
from models.experts import get_engine
from models.parameters import Params, prepare
from varjax.errors import InputError

_ROUNDS = 50  # of k-means at most; it stops much earlier


def expert_inputs(
    config: MoEConfig, params: Params, documents: Iterable[Encoded], tokens: int, batch_size: int = 4, length: int = 256
) -> np.ndarray:
    """Run a model and keep what its experts read.

    Args:
        config: the architecture.
        params: in the canonical layout.
        documents: read as far as needed.
        tokens: N, or fewer where the documents end.
        batch_size: windows of `length` per call.
        length: tokens of a window.

    Returns:
        float32 [L, N, D].
    """
    engine = get_engine("blocks")
    network, prepared = Network(config, engine), prepare(params, engine)
    layers, kept, number = tuple(range(config.num_layers)), [], 0
    for batch in batches(documents, batch_size, length):
        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        out = network.forward(prepared, ids, attention_mask=mask, last_logits_only=True, recorded_layers=layers)
        kept.append(np.stack([np.asarray(record.inputs)[batch.mask] for record in out.recorded]))
        number += kept[-1].shape[1]
        if number >= tokens:
            break
    return np.concatenate(kept, axis=1)[:, :tokens]


@jax.jit
def hidden_activations(x: jax.Array, expert: dict[str, jax.Array]) -> jax.Array:
    """Compute the activations of an expert's neurons.

    Args:
        x: [N, D], what the expert reads.
        expert: its weights in the canonical layout.

    Returns:
        [N, F].
    """
    return jax.nn.silu(x @ expert["gate"]) * (x @ expert["up"])


def contiguous_groups(neurons: int, groups: int) -> np.ndarray:
    """Group neurons in their order.

    Args:
        neurons: F.
        groups: G.

    Returns:
        int [G, S], the neurons of each group.

    Raises:
        InputError: G does not divide F.
    """
    if neurons % groups:
        raise InputError(f"{groups} groups: they do not divide the {neurons} neurons of a layer; give a divisor")
    return np.arange(neurons).reshape(groups, -1)


def coactive_groups(hidden: np.ndarray, groups: int) -> np.ndarray:
    """Group neurons whose activations are large at the same tokens.

    Balanced k-means from contiguous groups: the profile of a neuron is its |activation| at each token, divided by its
    norm. In each round the neurons choose the group with the nearest center that has room, those first that lose most
    by their second choice. The result is deterministic.

    Args:
        hidden: float32 [N, F], activations of the neurons.
        groups: G.

    Returns:
        int [G, S], the neurons of each group in ascending order.

    Raises:
        InputError: G does not divide F.
    """
    members = contiguous_groups(hidden.shape[1], groups)
    profiles = np.abs(hidden).T
    norms = np.linalg.norm(profiles, axis=1, keepdims=True)
    profiles = profiles / np.maximum(norms, np.finfo(np.float32).tiny)
    found, best = members, -1.0
    for _ in range(_ROUNDS):
        centers = profiles[members].sum(axis=1)  # [G, N]
        sizes = np.linalg.norm(centers, axis=1, keepdims=True)
        # The sum of these norms is what spherical k-means maximizes; assignments with room limits need not raise it.
        if sizes.sum() <= best * (1 + 1e-4):
            break
        found, best = members, float(sizes.sum())
        members = _assigned(profiles @ (centers / np.maximum(sizes, np.finfo(np.float32).tiny)).T)
    return found


def _assigned(scores: np.ndarray) -> np.ndarray:
    """int [G, S]: neurons to groups of equal size, by scores [F, G]."""
    neurons, groups = scores.shape
    if groups == 1:
        return contiguous_groups(neurons, 1)
    ranked = np.sort(scores, axis=1)
    room, chosen = np.full(groups, neurons // groups), np.empty(neurons, int)
    for neuron in np.argsort(ranked[:, -2] - ranked[:, -1], kind="stable"):
        chosen[neuron] = np.argmax(np.where(room > 0, scores[neuron], -np.inf))
        room[chosen[neuron]] -= 1
    return np.argsort(chosen, kind="stable").reshape(groups, -1)


def split_experts(config: MoEConfig, params: Params, groups: list[np.ndarray]) -> tuple[MoEConfig, Params]:
    """Make an expert of each group of neurons.

    The gate is zero, so each of the G experts has weight 1 / G, and its down projection is multiplied by G.

    Args:
        config: an architecture with one expert per layer.
        params: in the canonical layout.
        groups: of each layer, int [G, S]; G is the same in all layers.

    Returns:
        Architecture and parameters of an equivalent model with G experts, all of which run.
    """
    assert config.num_experts == 1, "the experts of a layer are split only once"
    number, size = groups[0].shape
    split = dataclasses.replace(config, num_experts=number, top_k=number, intermediate_size=size)
    experts = [
        {
            index: {
                "gate": layer[0]["gate"][:, members],
                "up": layer[0]["up"][:, members],
                "down": layer[0]["down"][members] * np.float32(number),
            }
            for index, members in enumerate(of_layer)
        }
        for layer, of_layer in zip(params["experts"], groups, strict=True)
    ]
    gate = {"kernel": np.zeros((config.hidden_size, number), np.float32)}
    layers = params["decoder"]["layers"]
    decoder = params["decoder"] | {"layers": jax.tree.map(lambda leaf: leaf, layers)}
    for place in config.expert_layers:
        decoder["layers"][place] = {**layers[place], "gate": gate}
    return split, {"decoder": decoder, "experts": experts}


@jax.jit
def _errors(hidden: jax.Array, down: jax.Array, members: jax.Array, kept: jax.Array) -> jax.Array:
    """float32[N]: the share of the squared output without all but the `kept` groups of largest contribution."""
    parts = jnp.einsum("ngs,gsd->ngd", hidden[:, members], down[members])
    ranks = jnp.argsort(jnp.argsort(-jnp.linalg.norm(parts, axis=-1), axis=1), axis=1)
    left = jnp.where((ranks >= kept)[..., None], parts, 0).sum(axis=1)
    return (left**2).sum(axis=-1) / (parts.sum(axis=1) ** 2).sum(axis=-1)


def unexplained(hidden: np.ndarray, down: np.ndarray, members: np.ndarray, kept: int) -> float:
    """Measure what a layer's output loses where each token runs only its best groups.

    Args:
        hidden: float32 [N, F], activations of the neurons.
        down: float32 [F, D], the down projection.
        members: int [G, S], the neurons of each group.
        kept: groups that run, those with the largest norm of their contribution at each token.

    Returns:
        |output of the other groups|^2 / |output|^2, the mean over tokens.
    """
    parts = np.array_split(hidden, -(-len(hidden) // 512))
    found = [_errors(part, down, members.astype(np.int32), np.int32(kept)) for part in parts]
    return float(np.concatenate(found).mean())
