"""Layers of a trace whose routing was not captured, and how they are recognized.

Letters: N tokens, L layers, E experts, K experts per token.

Programs that record routing fill the rows of a layer that they did not capture (such as a layer without experts) with
zeros, with -1, or with whatever their buffer held. Taken for routing, such a layer would be perfectly predictable. A
layer was not captured if one of these holds:

- Every entry is -1.
- Every entry is 0 and K > 1, since no router chooses an expert twice.
- Every token has the same experts in the same order, K < E, and the trace has at least `MIN_TOKENS` tokens of at least
  `MIN_IDS` different ids. Fewer tokens cannot tell: a router that sends nine of ten tokens to the same experts does so
  for 20 tokens in a row with probability 0.12, for 100 tokens with 0.00003.
"""

from __future__ import annotations

import numpy as np

from varjax.errors import InputError

MIN_TOKENS = 100
MIN_IDS = 10


def captured_layers(experts: np.ndarray, token_id: np.ndarray, num_experts: int) -> np.ndarray:
    """Find the layers of a trace that were captured.

    Args:
        experts: integers [N, L, K].
        token_id: integers [N].
        num_experts: E.

    Returns:
        bool [L].

    Raises:
        InputError: no layer was captured, or all that were have equal experts at every token, as if one was copied.
    """
    tokens, layers, top_k = experts.shape
    if tokens == 0:
        return np.ones(layers, bool)
    missing = np.all(experts == -1, axis=(0, 2)) | zero_layers(experts)
    enough = tokens >= MIN_TOKENS and top_k < num_experts and len(np.unique(token_id)) >= MIN_IDS
    if enough:
        missing |= np.all(experts == experts[:1], axis=(0, 2))
    if missing.all():
        raise InputError(
            f"no layer was captured: in each of the {layers} layers every row is 0 or -1, or all {tokens:,} tokens "
            "have the same experts"
        )
    known = experts[:, ~missing]
    if enough and known.shape[1] > 1 and np.all(known == known[:, :1]):
        raise InputError(f"all {known.shape[1]} captured layers have the same experts at every token: one was copied")
    return ~missing


def zero_layers(experts: np.ndarray) -> np.ndarray:
    """Find layers of zeros.

    Args:
        experts: integers [N, L, K].

    Returns:
        bool [L]; False if K is 1, as 0 is then a possible choice.
    """
    return np.all(experts == 0, axis=(0, 2)) & (experts.shape[-1] > 1)


def on_all_layers(values: np.ndarray, captured: np.ndarray, missing: float, axis: int = 0) -> np.ndarray:
    """Spread values of the captured layers over all layers.

    Args:
        values: with the captured layers along `axis`.
        captured: bool [L].
        missing: value at the other layers.
        axis: of the layers.

    Returns:
        The values with L layers along `axis`.
    """
    whole = np.full((*values.shape[:axis], len(captured), *values.shape[axis + 1 :]), missing, values.dtype)
    whole[(slice(None),) * axis + (captured,)] = values
    return whole
