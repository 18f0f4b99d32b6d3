"""Phase 1 as one resumable run: choose the keys, collect their statistics, collect the residual rows of some of them.

What is finished is on disk; a run that was killed repeats nothing but what came after its last checkpoint, and ends
with the same result.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.collection.answers import collect_answers
from analysis.collection.checkpoints import Checkpoints
from analysis.collection.passes import SAVE_TOKENS
from analysis.collection.statistics import KeySettings, choose_keys, collect
from analysis.policy import candidate_rules
from analysis.provenance import provenance
from analysis.text.encoded_corpus import EncodedCorpus
from models import Model
from varjax import answersfile, statsfile
from varjax.config import residuals_beside
from varjax.keys import ContextCounts
from varjax.stats import RoutingStats

STATS = "routing_stats.parquet"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run, beside the model and the documents."""

    keys: KeySettings = dataclasses.field(default_factory=KeySettings)
    layers: tuple[int, ...] | None = None  # to collect statistics of; None: all
    residual_orders: tuple[int, ...] = (1, 2)  # context orders that get residual rows; (): none does
    residual_min_count: int = 15  # occurrences that a key with a residual row needs
    batch_size: int = 8  # rows per device and batch at `max_length`
    max_length: int = 256  # tokens per window
    save_tokens: int = SAVE_TOKENS  # tokens between checkpoints


def analyse(
    model: Model, corpus: EncodedCorpus, folder: Path, settings: Settings, *, seed: int = 0, progress: bool = True
) -> tuple[RoutingStats, ContextCounts]:
    """Write `routing_stats.parquet` and, if asked for, its residual rows into `folder`.

    The checkpoints lie in `folder/routing_checkpoints` and are removed at the end. Of several processes each reads its
    share of the documents, into a folder of its own; the keys are those of all documents.

    Args:
        seed: noted in the provenance; nothing here is drawn.
        progress: show bars on standard error.

    Returns:
        The statistics, and the keys with their counts over all documents.

    Raises:
        ValueError: no key, a layer that does not exist, residual rows of an order that is not collected, or `folder`
            holds the checkpoints of another run.
    """
    strange = sorted(set(settings.residual_orders) - set(settings.keys.orders))
    if strange:
        raise ValueError(
            f"residual orders {strange} are not among the orders {settings.keys.orders}; collect those too"
        )
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype.name}
    run = {
        "model": about,
        "data": corpus.request,
        "settings": dataclasses.asdict(settings),
        "devices": [jax.process_count(), jax.local_device_count()],
    }
    checkpoints = folder / "routing_checkpoints"
    reading: dict[str, Any] = {name: getattr(settings, name) for name in ("batch_size", "max_length", "save_tokens")}
    reading["progress"] = progress

    with Checkpoints(checkpoints / "keys", run) as saved:
        keys = choose_keys(model, corpus, settings.max_length, settings.keys, saved)
    with Checkpoints(checkpoints / "statistics", run) as saved:
        stats = collect(model, corpus, keys, layers=settings.layers, checkpoints=saved, **reading)
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "top_k": model.config.top_k,
        "vocab_size": model.config.vocab_size,
        "provenance": provenance(seed=seed, model=about, data=corpus.about, settings=run["settings"]),
    }
    strings = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer))) if model.tokenizer else None
    statsfile.write(folder / STATS, stats, meta, strings)

    often = keys.counts >= settings.residual_min_count
    answerable = keys.keys[np.isin(stats.row_orders, settings.residual_orders) & often]
    if len(answerable):
        layers = range(model.config.num_layers) if settings.layers is None else settings.layers
        rules = candidate_rules(layers, model.config.top_k)
        with Checkpoints(checkpoints / "residuals", run) as saved:
            answers = collect_answers(
                model, corpus, answerable, settings.residual_orders, rules, checkpoints=saved, **reading
            )
        answersfile.write(residuals_beside(folder / STATS), answers, meta)
    shutil.rmtree(checkpoints)
    return stats, keys
