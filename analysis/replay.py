"""Replaying a VARConfig against a routing trace, without the model.

Letters: N tokens replayed, S steps, T tokens per step, L layers, E experts, K experts per token, A age buckets.

    python -m analysis.replay --trace trace.parquet --preset balanced --output results/replay

The documents of the trace are split by a hash of their ids. On one part the table is built, from statistics taken off
the trace; through the others goes the real thing, `varjax.step.plan` and `commit`, one document after the other, `step`
tokens at a time; the router's own decision is the trace's. What depends on hidden states is not there: no residual rows
and no logits, so nothing here says what the plans cost in quality. The clock is the trace's: `seconds_per_token` for
every token replayed, in one stream; a server that interleaves many texts sees other ages and evictions.

All of it is teacher-forced: the ids are those of the trace, whatever the plans would have done to the text. Generated
text (phase `decode`) repeats itself more than prose does, and flatters every cache. A look-up sees earlier steps only:
with a long step, as in prefill, repetitions inside a step are lost; a step of one token is decoding. Layers and tokens
of one document depend on each other: count documents, not tokens, when judging how sure a figure is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.command import HelpFormatter, path_argument, program
from analysis.evaluate.losses import SECONDS_PER_TOKEN
from analysis.report.files import write_output
from analysis.report.output import OUTPUT_HELP, Output
from analysis.report.provenance import hash_json, provenance
from analysis.report.report import text
from analysis.traces import importing, replay_report
from analysis.traces.capture import on_all_layers
from analysis.traces.replay_inputs import applicable, on_captured_layers, table_statistics, with_stand_ins
from analysis.traces.replay_steps import Sums, run_steps, unlimited_cache
from analysis.traces.trace import Trace, TraceError
from varjax.checksums import digest_of_file
from varjax.config import PRESETS, VARConfig
from varjax.errors import InputError
from varjax.routing import CACHED, FAST
from varjax.step import TIERS
from varjax.table import build_table

_AGE_BUCKETS = 18  # up to one step, then each twice as long; the last has no end


@dataclass(frozen=True)
class Replay:
    """What a config would have decided on a trace."""

    config: VARConfig  # as applied
    notes: tuple[str, ...]  # what could not be applied, and what figures rest on
    origin: dict[str, Any]  # of the trace
    build_documents: int
    build_tokens: int
    documents: int
    tokens: int
    keys: int  # of the table
    step: int  # tokens
    seconds_per_token: float
    ranked: bool  # False: agreement means nothing
    has_probs: bool  # False: mass means nothing
    num_experts: int
    top_k: int
    age_edges: np.ndarray  # int64 [A], tokens, where each age bucket begins; the last has no end
    sums: Sums
    unlimited: np.ndarray  # int64 [L], decisions of a cache without bounds
    unlimited_agreements: np.ndarray  # int64 [L]
    constant_agreements: np.ndarray  # int64 [L], tokens whose first expert is the layer's commonest first
    constant_recalled: np.ndarray  # int64 [L], chosen experts among the layer's K busiest

    @property
    def has_ages(self) -> bool:
        """Whether decisions were used again, and can be judged."""
        return self.ranked and bool(self.sums.aged.any())

    def rates(self, layer: int | None = None) -> dict[str, Any]:
        """The figures of one layer, or of all together, in shares; None where there is nothing to divide or judge."""
        whole = ("unlimited", "unlimited_agreements", "constant_agreements", "constant_recalled")
        at = vars(self.sums) | {name: getattr(self, name) for name in whole}
        at = {name: values.sum(axis=0) if layer is None else values[layer] for name, values in at.items()}
        total = int(at["tokens"].sum())

        def agreement(agreed: Any, of: Any) -> float | None:
            return _ratio(agreed, of) if self.ranked else None

        tiers = {}
        for tier in (FAST, CACHED):
            tokens = at["tokens"][tier]
            tiers[TIERS[tier]] = {
                "agreement": agreement(at["agreements"][tier], tokens),
                "recall": _ratio(at["recalled"][tier], tokens * self.top_k),
                "experts_kept": _ratio(at["kept_chosen"][tier], at["experts_kept"][tier]),
                "mass": _ratio(at["mass"][tier], tokens) if self.has_probs else None,
                "experts_per_token": _ratio(at["active"][tier], tokens),
            }
        return {
            "shares": {name: _ratio(count, total) for name, count in zip(TIERS, at["tokens"], strict=True)},
            **tiers,
            "experts_per_token": _ratio(at["active"].sum(), total),
            "unlimited_cache": {
                "share": _ratio(at["unlimited"], total),
                "agreement": agreement(at["unlimited_agreements"], at["unlimited"]),
            },
            "constant": {
                "agreement": agreement(at["constant_agreements"], total),
                "recall": _ratio(at["constant_recalled"], total * self.top_k),
            },
            "mispredictions_by_age": [
                {"from_tokens": int(edge), "decisions": int(n), "mispredictions": rate if rate is None else 1 - rate}
                for edge, n, rate in zip(
                    self.age_edges, at["aged"], map(agreement, at["aged_agreements"], at["aged"]), strict=True
                )
                if n
            ],
        }


def replay(
    trace: Trace,
    config: VARConfig,
    *,
    build_share: float = 0.7,
    step: int = 64,
    seconds_per_token: float = SECONDS_PER_TOKEN,
) -> Replay:
    """What `config` would have decided on the documents of `trace` that its table is not built on.

    Args:
        config: the settings; the table comes from the trace.
        build_share: share of the documents that the table is built on.
        step: tokens between a look-up and the commit of what was learned; steps end with their document.
        seconds_per_token: the clock; 0.01 is a stream of 100 tokens per second.

    Raises:
        TraceError: the trace has too few documents for both parts.
        InputError: a setting out of range, VAR switched off, or a policy that does not fit the trace.
    """
    if step < 1 or not 0 < seconds_per_token < math.inf or not 0 < build_share < 1:
        raise InputError(
            f"step={step}, seconds_per_token={seconds_per_token}, build_share={build_share}: "
            "expected at least 1, above 0, and between 0 and 1"
        )
    config, notes = applicable(config, trace)
    captured = trace.captured
    judged = with_stand_ins(trace.captured_part())
    ours_only = on_captured_layers(config, captured)
    building = trace.build_documents(build_share)
    ours, theirs = judged.of(building), judged.of(~building)
    if not len(ours.token_id) or not len(theirs.token_id):
        raise TraceError(
            f"{len(np.unique(trace.document))} documents with tokens, of which {len(np.unique(ours.document))} build "
            f"the table at build_share={build_share}: both parts need one; give more documents or another share"
        )
    stats, more = table_statistics(ours, ours_only)
    table = build_table(ours_only, stats, top_k=trace.top_k, keep_shapes=True)  # another policy recompiles nothing
    edges = np.append(0, step << np.arange(_AGE_BUCKETS - 1))
    sums, tier = run_steps(theirs, table, ours_only, step, seconds_per_token, edges)
    by_layer = (*unlimited_cache(theirs, tier == FAST, ours_only, step), *constant_table(ours, theirs))
    unlimited, unlimited_agreements, constant_agreements, constant_recalled = (
        on_all_layers(one, captured, 0) for one in by_layer
    )
    sums = Sums(**{name: on_all_layers(values, captured, 0) for name, values in vars(sums).items()})
    return Replay(
        config=config,
        notes=(*trace.remarks(), *notes, *more),
        origin=dict(trace.origin),
        build_documents=len(np.unique(ours.document)),
        build_tokens=len(ours.token_id),
        documents=len(np.unique(theirs.document)),
        tokens=len(theirs.token_id),
        keys=int(np.sum(np.any(np.asarray(table.eligible), axis=0))),
        step=step,
        seconds_per_token=seconds_per_token,
        ranked=trace.ranked,
        has_probs=trace.probs is not None,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        age_edges=edges,
        sums=sums,
        unlimited=unlimited,
        unlimited_agreements=unlimited_agreements,
        constant_agreements=constant_agreements,
        constant_recalled=constant_recalled,
    )


def constant_table(build: Trace, scored: Trace) -> tuple[np.ndarray, np.ndarray]:
    """int64 [L], int64 [L]: scored tokens whose first expert is the build part's commonest first, and scored
    assignments to one of its K busiest experts."""
    agreements, recalled = np.zeros((2, scored.num_layers), np.int64)
    for layer in range(scored.num_layers):
        firsts = np.bincount(build.experts[:, layer, 0], minlength=build.num_experts)
        busiest = np.argsort(-np.bincount(build.experts[:, layer].ravel(), minlength=build.num_experts), kind="stable")
        agreements[layer] = np.sum(scored.experts[:, layer, 0] == firsts.argmax())
        recalled[layer] = np.sum(np.isin(scored.experts[:, layer], busiest[: scored.top_k]))
    return agreements, recalled


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def fields_of(found: Replay) -> dict[str, Any]:
    """What is saved: the settings, and `rates` of all layers together and of each."""
    plain = {name: value for name, value in vars(found).items() if name not in ("config", "sums", "age_edges")}
    plain = {name: value for name, value in plain.items() if not name.startswith(("unlimited", "constant"))}
    return {**plain, **found.rates(), "layers": [found.rates(layer) for layer in range(len(found.sums.tokens))]}


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description="Replay a VARConfig against a routing trace.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--trace", type=path_argument, required=True, help="a trace file, or a foreign .npz")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", type=path_argument, help="JSON of a VARConfig")
    which.add_argument("--preset", choices=sorted(PRESETS), default="balanced")
    parser.add_argument("--output", type=path_argument, default=Path("results/replay"), help=OUTPUT_HELP)
    parser.add_argument("--build_share", type=float, default=0.7, help="share of the documents that build the table")
    parser.add_argument("--step", type=int, default=64, help="tokens between a look-up and its commit")
    parser.add_argument(
        "--seconds_per_token", type=float, default=SECONDS_PER_TOKEN, help="the clock that ages the cache"
    )
    args = parser.parse_args(arguments)
    output = Output.of(args.output, "replay")
    with output.locked():
        _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> None:
    config = VARConfig.load(args.config) if args.config else VARConfig.preset(args.preset)
    settings = {name: getattr(args, name) for name in ("build_share", "step", "seconds_per_token")}
    found = replay(importing.load(args.trace), config, **settings)
    said = replay_report.report(found)
    print(text(said))
    applied = json.loads(found.config.to_json())
    hashes: dict[str, Any] = {"trace_sha256": digest_of_file(args.trace), "config_sha256": hash_json(applied)}
    origin = provenance(trace=str(args.trace), config=applied, **hashes, **settings)
    beside = {**fields_of(found), "provenance": origin}
    write_output(said, output, figures=replay_report.draw(found), beside=beside)
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
