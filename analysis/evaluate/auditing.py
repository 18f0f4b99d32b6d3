"""The audit over documents: its calibration, and what it observes.

Letters: N documents, M streams (`varjax.drift`).

A document is one observation, however many windows it is read in: their tallies are added up before its means are
taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import jax
import numpy as np

from analysis.evaluate.losses import INDEPENDENT, Caching
from analysis.text.batches import Batch, batches
from analysis.text.encoding import Encoded
from varjax import drift
from varjax.audit import audited
from varjax.drift import Calibration, Stream, Tally, observe, watched
from varjax.errors import InputError
from varjax.model import VARModel
from varjax.progress import progress_bar
from varjax.step import VARState
from varjax.transfer import random_key, to_device


def calibrate(var_model: VARModel, documents: Sequence[Encoded], *, share: float = 0.05, **reading: Any) -> Calibration:
    """Measure what the audit observes where nothing is wrong, with bounds on its means.

    Args:
        var_model: the model to watch.
        documents: from the population that VAR will meet, none of them used to build its table.
        share: of the planned tokens to compute in full, here and later.
        reading: the other arguments of `tally_documents`.

    Returns:
        What `varjax.audit.Auditor` compares with.

    Raises:
        InputError: fewer than two documents, a share outside (0, 1], or VAR is switched off.
    """
    sums, _ = tally_documents(var_model, documents, share, **reading)
    return calibrate_from(observe(sums, streams_of(var_model)), var_model, share)


def calibrate_from(observed: np.ndarray, var_model: VARModel, share: float) -> Calibration:
    """Make a calibration from what was observed already.

    Args:
        observed: float64 [N, M].
        var_model: the model that was watched.
        share: of the planned tokens that was computed in full.

    Returns:
        The calibration.
    """
    origin = {"fingerprint": var_model.model.fingerprint, "config_sha256": var_model.digest}
    return drift.calibrate(observed, streams_of(var_model), share=share, **origin)


def streams_of(var_model: VARModel) -> tuple[Stream, ...]:
    """The M streams that are watched of this model."""
    return watched(var_model.config, var_model.model.config.num_layers)


def tally_documents(
    var_model: VARModel,
    documents: Sequence[Encoded],
    share: float,
    *,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
    caching: Caching = INDEPENDENT,
) -> tuple[Tally, VARState]:
    """Run every document under VAR and under audit.

    Which tokens are audited follows from the seed and the document alone.

    Args:
        var_model: the model to watch.
        documents: in token ids.
        share: of the planned tokens to compute in full.
        seed: of the draw of these tokens.
        batch_size: as in `analysis.text.batches.batches`.
        max_length: as in `analysis.text.batches.batches`.
        progress: show a bar on standard error.
        caching: which documents share a cached tier.

    Returns:
        The tally of each document, with B = N on the host, and the last state.

    Raises:
        InputError: VAR is switched off.
    """
    state = caching.init(var_model, batch_size)
    if state is None:
        raise InputError("VAR is switched off (enable_var=False): there is nothing to audit")
    parts, owners = [], []
    read = progress_bar(documents, unit="document", show=progress)
    for batch in batches(read, batch_size, max_length, one_by_one=state.own_caches):
        state, now = caching.enter(state, batch)
        (ids, mask), keys = to_device((batch.ids, batch.mask)), _keys(batch, documents, seed)
        _, state, tally, _ = audited(var_model, state, ids, mask, keys, share, now)
        parts.append(jax.device_get(tally))
        owners.append(batch.documents)
    owner = np.concatenate(owners)

    def by_document(*leaves: np.ndarray) -> np.ndarray:
        windows = np.concatenate(leaves)[owner >= 0]
        sums = np.zeros((len(documents), *windows.shape[1:]), np.result_type(windows, np.int64))
        np.add.at(sums, owner[owner >= 0], windows)
        return sums

    return jax.tree.map(by_document, *parts), state


def _keys(batch: Batch, documents: Sequence[Encoded], seed: int) -> jax.Array:
    """A PRNG key for each row, from the seed, the document and the window's text."""
    names = [documents[owner].id.encode() if owner >= 0 else b"" for owner in batch.documents]
    hashes = [
        crc32(ids[mask].tobytes(), crc32(name)) for ids, mask, name in zip(batch.ids, batch.mask, names, strict=True)
    ]
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(random_key(seed), to_device(np.array(hashes, np.uint32)))
