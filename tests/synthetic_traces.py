"""Small traces of known routing, for several test files."""

from typing import Any

import numpy as np

from analysis.traces.trace import Trace


def make_trace(
    experts: np.ndarray,
    num_experts: int,
    *,
    token_id: np.ndarray | None = None,
    probs: np.ndarray | None = None,
    length: int = 50,
    last_first: bool = False,
    **fields: Any,
) -> Trace:
    """Documents of `length` tokens each; experts [N, L, K].

    Args:
        token_id: [N]; None: all the same.
        last_first: the documents' indices fall.
    """
    tokens = len(experts)
    documents = -(-tokens // length)
    document = np.arange(tokens) // length
    return Trace(
        token_id=np.zeros(tokens, np.int32) if token_id is None else np.asarray(token_id, np.int32),
        document=(documents - 1 - document if last_first else document).astype(np.int32),
        position=(np.arange(tokens) % length).astype(np.int32),
        experts=np.asarray(experts, np.int16),
        probs=probs,
        document_ids=tuple(f"document {i}" for i in range(documents)),
        groups=("g",) * documents,
        num_experts=num_experts,
        probs_over=None if probs is None else "all",
        **fields,
    )


def zipf_ids(rng: np.random.Generator, tokens: int, vocabulary: int) -> np.ndarray:
    """int32 [tokens]: ids whose frequency falls as 1 / rank."""
    weight = 1 / np.arange(1.0, vocabulary + 1)
    return rng.choice(vocabulary, tokens, p=weight / weight.sum()).astype(np.int32)
