"""What an answer adds for the token at hand: a small linear map of the expert's input.

Letters: D hidden size, E experts, K experts per token, N answers of a layer, r rank.

A mean output is all that a constant answer knows. On a real language model, much of an expert's deviation from the mean
at a key is linear in the deviation of its input from the mean input there. With q and p the mean output and the mean
input of expert e at a key, an affine answer to the input x is

    q + (x - p) @ read @ mix[e] @ write

The experts of a layer share what they read, [D, r], and what they write, [r, D]; each has its own mix, [r, r]. One
product of x with `read` serves every expert, another expert costs only r^2 more, and a pair of key and expert stores
only `p @ read @ mix[e]`, r numbers. The rows of `write` are orthonormal, so the length of the deviation is that of the
output it stands for, and says how far the token is from what the answer knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from varjax.transfer import to_device

_TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AffineMap:
    """The map of one layer and what its answers subtract from it. On the host or, once `stored`, on the device."""

    read: Any  # [D, r]
    mix: Any  # [r, E, r]
    write: Any  # [r, D], orthonormal rows
    center: Any  # [N, r], the mean input of each answer behind `read` and its expert's `mix`
    slope: Any  # float32 [E], mean squared error of an answer per squared length of the deviation

    def stored(self, dtype: str) -> AffineMap:
        """The map as it is held on the device.

        Args:
            dtype: "float32", or "bfloat16", which takes half of the bytes.

        Returns:
            The map; `slope` stays in float32.
        """
        kind = jnp.dtype(dtype)
        arrays = (np.asarray(one, kind) for one in (self.read, self.mix, self.write, self.center))
        return AffineMap(*to_device((*arrays, self.slope)))

    def deviations(self, x: Array, experts: Array, answer: Array) -> Array:
        """How far each expert's output is predicted to be from its answer, in the space that `write` reads.

        Args:
            x: [..., D], what the experts read.
            experts: int32 [..., K]; E for an unused slot.
            answer: int32 [..., K], the answers of these experts; where there is none, the result means nothing.

        Returns:
            float32 [..., K, r].
        """
        dtype = x.dtype
        read = jnp.dot(x, self.read.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)
        every = jnp.einsum("...r,res->...es", read, self.mix.astype(dtype), preferred_element_type=jnp.float32)
        own = jnp.take_along_axis(every, experts[..., None], axis=-2, mode="clip")
        return own - self.centers(experts, answer)

    def centers(self, experts: Array, answer: Array) -> Array:
        """What the deviations of answers are measured from.

        Args:
            experts: int32 [..., K]; E for an unused slot.
            answer: int32 [..., K], the answers of these experts; where there is none, the result means nothing.

        Returns:
            float32 [..., K, r], the answers' mean inputs behind `read` and their experts' `mix`.
        """
        return self.center.at[answer].get(mode="clip").astype(jnp.float32)

    def error(self, deviation: Array, experts: Array, deviations: Array) -> Array:
        """The expected distance of each expert's output from its affine answer.

        Args:
            deviation: float32 [..., K], of the answers at the mean input.
            experts: int32 [..., K]; E for an unused slot.
            deviations: float32 [..., K, r], from `deviations`.

        Returns:
            float32 [..., K].
        """
        away = jnp.sum(jnp.square(deviations), axis=-1)
        return jnp.sqrt(jnp.square(deviation) + self.slope.at[experts].get(mode="clip") * away)

    def output(self, moved: Array) -> Array:
        """What the deviations of the dropped experts add to the output of a layer.

        Args:
            moved: float32 [..., r], their sum by the gate weights.

        Returns:
            float32 [..., D].
        """
        return jnp.dot(moved, self.write.astype(jnp.float32), preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Maps:
    """The maps of all layers that are collected (A of them), as `varjax.fitting.fit` finds them. Host arrays."""

    read: np.ndarray  # float32 [A, D, r]
    mix: np.ndarray  # float32 [A, E, r, r]
    write: np.ndarray  # float32 [A, r, D]
    unexplained: np.ndarray  # float64 [A, E], share of the squared deviation that they leave, on held-out text

    @property
    def rank(self) -> int:
        """r."""
        return self.read.shape[-1]

    def outputs(self, a: int, inputs: np.ndarray, expert: np.ndarray) -> np.ndarray:
        """What the maps of one layer make of deviations from mean inputs.

        Args:
            a: the layer's place among those that are collected.
            inputs: float32 [N, D], deviations.
            expert: int32 [N], whose maps are applied.

        Returns:
            float32 [N, D].
        """
        return self._mixed(a, inputs, expert) @ self.write[a]

    def _mixed(self, a: int, inputs: np.ndarray, expert: np.ndarray) -> np.ndarray:
        """float32 [N, r]: inputs [N, D] behind `read` and the `mix` of their experts int32 [N]."""
        mixed = inputs @ self.read[a]
        for e, mix in enumerate(self.mix[a]):
            mixed[expert == e] = mixed[expert == e] @ mix
        return mixed

    def of_layer(
        self, a: int, inputs: np.ndarray, expert: np.ndarray, deviation: np.ndarray
    ) -> tuple[AffineMap | None, np.ndarray]:
        """One layer's map for a table.

        The mean squared error e of an answer is divided between what is the same for all tokens of a key and what grows
        with the deviation: with v the variance around a constant answer and u the share that stays unexplained, tokens
        deviate by (1 - u) v on average, and half of e = u v is attributed to each.

        Args:
            a: the layer's place among those that are collected.
            inputs: float32 [N, D], the mean inputs of the layer's answers.
            expert: int32 [N], whose answers they are.
            deviation: float32 [N], square root of v.

        Returns:
            The map, in float32, None if it adds nothing; and the deviations float32 [N] left at the mean input.
        """
        if not self.mix[a].any():
            return None, deviation
        share = self.unexplained[a]
        slope = np.minimum(share / np.maximum(2 * (1 - share), _TINY), 1)
        constant = share - slope * (1 - share)
        center = self._mixed(a, inputs, expert)
        mix, slope = self.mix[a].transpose(1, 0, 2), np.asarray(slope, np.float32)
        left = deviation * np.sqrt(constant[expert])
        return AffineMap(self.read[a], mix, self.write[a], center, slope), np.asarray(left, np.float32)
