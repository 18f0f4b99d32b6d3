"""Phase 1 as one resumable run: choose the keys, collect their statistics, collect the answers at some of them.

What is finished is on disk: a killed run repeats only what came after its last checkpoint, and ends with the same
result. Of several processes each runs the model on its share of the documents and writes a part; the first one merges
the parts. They never communicate, so they need no coordinator: they meet in a folder that all of them see, may begin
and end at different times, and a killed one is restarted by itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from analysis.checkpoints import Checkpoints, note, resumed
from analysis.collect.answers import collect_answers
from analysis.collect.maps import directions_for, first_tokens, with_maps
from analysis.collect.passes import EVERY_DOCUMENT, SAVE_TOKENS, Reading, Share, mesh_of
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.steps import Steps
from analysis.text.encoded_corpus import EncodedCorpus
from analysis.text.sources import CorpusError
from models import Model, MoEConfig
from varjax import answers, answersfile, stats, statsfile
from varjax.config import VARConfig
from varjax.errors import InputError
from varjax.files import remove
from varjax.keys import ContextCounts, OrderCount
from varjax.progress import progress_bar
from varjax.shrinkage import likeliest
from varjax.stats import RoutingStats, bytes_a_key
from varjax.tablefiles import answers_next_to

STATS, TRACE = "routing_stats.parquet", "routing_trace.parquet"
_WORK = "routing_checkpoints"  # the folder inside the output; removed by `finish`
_SAME = ("fingerprint", "top_k", "vocab_size", "layers")  # what merged parts must agree on


@dataclasses.dataclass(frozen=True)
class CollectSettings:
    """What decides the result of a run, besides the model and the documents. Raises InputError naming bad fields."""

    keys: KeySettings = dataclasses.field(default_factory=KeySettings)
    layers: tuple[int, ...] | None = None  # to collect statistics of; None: all
    answer_orders: tuple[int, ...] = (1, 2, 3)  # context orders that get answers; (): none
    answer_min_count: int = 10  # occurrences that a key with answers needs
    stats_bytes: int = 1 << 32  # for statistics on each device; fewer keys are admitted where they would not fit
    # For the answers' sums on each device: only the likeliest are taken if need be. Fitting maps takes as much again.
    answer_bytes: int = 1 << 32
    answer_rank: int = 0  # of the maps that make answers affine; 0: answers are constant
    map_tokens: int = 1 << 18  # of the documents, from which the maps are fitted; an eighth as many are held out
    batch_size: int = 8  # rows per device and batch at `max_length`
    max_length: int = 256  # tokens per window
    save_tokens: int = SAVE_TOKENS  # tokens between checkpoints

    def __post_init__(self) -> None:
        least = {"answer_min_count": 1, "stats_bytes": 0, "answer_bytes": 0, "answer_rank": 0, "map_tokens": 1}
        least |= {"batch_size": 1, "max_length": 2, "save_tokens": 1}
        faults = [
            f"{name}={getattr(self, name)}: expected at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        strange = sorted(set(self.answer_orders) - set(self.keys.orders))
        if strange:
            faults.append(f"answer orders {strange} are not among the orders {self.keys.orders}; collect those too")
        if faults:
            raise InputError("; ".join(faults))

    def _layers_of(self, model: Model) -> tuple[int, ...]:
        """The layers to collect, ascending. Raises InputError for one that the model does not have."""
        every = range(model.config.num_layers)
        chosen = tuple(every) if self.layers is None else tuple(sorted(set(self.layers)))
        if not chosen or not set(chosen) <= set(every):
            raise InputError(f"layers {list(chosen)}: expected some of 0 to {len(every) - 1}, the layers of the model")
        return chosen

    def _keys_of(self, config: MoEConfig, num_layers: int) -> KeySettings:
        """Which keys get a row, bounded by the memory for them. Raises InputError if there is no room for one."""
        one = bytes_a_key(num_layers, config.num_experts)
        room = self.stats_bytes // one
        if room < 1:
            raise InputError(f"stats_bytes={self.stats_bytes}: one key takes {one:,}; allow more, or fewer layers")
        most = room if self.keys.max_keys is None else min(self.keys.max_keys, room)
        return dataclasses.replace(self.keys, max_keys=most)

    def _pairs_of(self, config: MoEConfig, num_layers: int) -> int:
        """The pairs of a key and an expert in each layer that there is memory for, besides those of order 0."""
        one = answers.bytes_a_pair(num_layers, config.num_experts, config.hidden_size, self.answer_rank > 0)
        return max(self.answer_bytes // one - config.num_experts, 0)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a run found."""

    stats: RoutingStats  # of all processes together
    keys: ContextCounts  # with their counts over all documents
    answered: int  # keys that got answers
    answerable: int  # keys that were frequent enough for them
    pairs: int  # of a key and an expert with room for an answer, in each layer at most


def analyze(
    model: Model,
    corpus: EncodedCorpus,
    output: Path,
    settings: CollectSettings,
    *,
    held_out: EncodedCorpus | None = None,
    share: Share = EVERY_DOCUMENT,
    seed: int = 0,
    progress: bool = True,
) -> Analysis | None:
    """Write `routing_stats.parquet` and, if asked for, the experts' answers into `output`.

    Checkpoints are kept in `output/routing_checkpoints` until `finish` is called.

    Args:
        model: the model.
        corpus: the documents.
        output: a directory, or the file of the statistics; see `place`.
        settings: what to collect.
        held_out: other documents, which say how far the maps of affine answers may be trusted; needed with
            `settings.answer_rank`. Results must not be reported on them.
        share: of the documents, where several processes divide them; the first one waits for the others' parts.
        seed: noted in the provenance; nothing here is drawn.
        progress: show bars on standard error.

    Returns:
        What was found; None in all processes but the first.

    Raises:
        InputError: no key, a layer that does not exist, or `output` holds the checkpoints of another run.
        CorpusError: the documents are not those that a resumed run began with.
    """
    layers = settings._layers_of(model)
    if settings.answer_rank:
        directions_for(settings.answer_rank, settings.answer_bytes, model.config, len(layers))  # before any pass
        if held_out is None:
            raise InputError(f"answer_rank={settings.answer_rank}: maps need held_out documents, of another split")
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype.name}
    run = {
        "model": about | {"implementation": model.engine.name},
        "data": corpus.request,
        "settings": dataclasses.asdict(settings),
        "held_out": held_out.request if settings.answer_rank and held_out is not None else None,
        "processes": share.of,
        "devices": dict(mesh_of(model).shape),
    }
    at = place(output)
    works = [at.other(_WORK) / f"process-{index}" for index in range(share.of)]
    work, alone = works[share.index], share.of == 1
    keys, noted = _keys(model, corpus, settings, work, run, progress)
    order, num_experts = np.sum(keys.keys >= 0, axis=1), model.config.num_experts
    answerable = np.isin(order, settings.answer_orders) & (keys.counts >= settings.answer_min_count)
    room = settings._pairs_of(model.config, len(layers))
    frequent = np.flatnonzero(answerable)  # more keys than pairs would be of no use: the most frequent ones
    frequent = np.sort(frequent[np.argsort(-keys.counts[frequent], kind="stable")[:room]])
    pairs = min(room, len(frequent) * num_experts)

    documents = share.documents(corpus)
    part = at if alone else place(work)
    own = part.main(".parquet")
    shape = {"top_k": model.config.top_k, "vocab_size": model.config.vocab_size, "layers": list(layers)}
    origin = {"provenance": provenance(seed=seed, model=about, data=noted, settings=run["settings"])}
    meta = {"model": model.name, "fingerprint": model.fingerprint, **shape, **origin}

    def reading(name: str) -> Reading:
        sizes: Reading = {"batch_size": settings.batch_size, "max_length": settings.max_length}
        saved: Reading = {"checkpoints": Checkpoints(work / name), "save_tokens": settings.save_tokens}
        return {**sizes, **saved, "progress": progress}

    done = work / "statistics.done"
    if not done.exists():
        found = collect(model, documents, keys, layers=layers, **reading("statistics"))
        _check_same(corpus.about, noted, work)
        strings = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer))) if model.tokenizer else None
        for companion in (answers_next_to(own), part.other(TRACE)):
            companion.unlink(missing_ok=True)  # belongs to statistics that a previous run left here
        statsfile.write(own, found, meta, strings)
        done.touch()
    done = work / "answers.done"
    if len(frequent) and not done.exists():
        chosen, wanted = keys.keys[frequent], None
        if pairs < len(frequent) * num_experts:
            wanted = likeliest(statsfile.read(own)[0], chosen, layers, pairs)
        inputs = settings.answer_rank > 0
        averaged = collect_answers(model, documents, chosen, layers, pairs=wanted, inputs=inputs, **reading("answers"))
        _check_same(corpus.about, noted, work)
        answersfile.write(answers_next_to(own), averaged, meta | {"statistics": statsfile.identity(own)})
        done.touch()
    (work / "part.done").touch()
    if share.index > 0:
        return None
    merged = work / "merged.done"
    if not alone and not merged.exists():
        _wait([path / "part.done" for path in works], progress)
        merge_files([path / STATS for path in works], at.main(".parquet"), origin)
        merged.touch()  # from here on, the answers may become affine
    path, done = answers_next_to(at.main(".parquet")), work / "maps.done"
    if settings.answer_rank and path.is_file() and not done.exists():
        assert held_out is not None
        _fit_maps(model, path, corpus, held_out, settings, reading("maps"))
        done.touch()
    together, _ = statsfile.read(at.main(".parquet"))
    return Analysis(together, keys, len(frequent), int(answerable.sum()), pairs)


def later_steps(output: Path, run: Mapping[str, Any]) -> Steps:
    """Keep what a run does after `analyze` until `finish` is called.

    Args:
        output: see `analyze`.
        run: what decides it, besides what decides the rest of the run.

    Returns:
        The steps, next to the checkpoints.
    """
    return Steps(place(output).other(_WORK) / "later", run)


def _fit_maps(
    model: Model,
    path: Path,
    corpus: EncodedCorpus,
    held_out: EncodedCorpus,
    settings: CollectSettings,
    reading: Reading,
) -> None:
    """Make the answers in a file affine. The processes' parts were merged before, so one process does this."""
    constant, meta = answersfile.read(path)
    texts = first_tokens(corpus, settings.map_tokens), first_tokens(held_out, max(settings.map_tokens // 8, 1))
    shrinkage = VARConfig().answer_shrinkage
    rank, memory = settings.answer_rank, settings.answer_bytes
    affine = with_maps(model, constant, *texts, rank, shrinkage, memory, **reading)
    answersfile.write(path, affine, meta | {"maps": {"held_out": held_out.request, "tokens": settings.map_tokens}})


def finish(output: Path) -> None:
    """Remove the checkpoints when everything that the run had to write is written.

    Args:
        output: see `analyze`.
    """
    remove(place(output).other(_WORK))


def place(output: Path) -> Output:
    """Tell where a run writes: into a directory or, for an output such as `runs/a.parquet`, next to that file.

    Args:
        output: as a user gives it.

    Returns:
        The place.

    Raises:
        InputError: a file that is not Parquet, or something of the other kind exists there.
    """
    return Output.of(output, Path(STATS).stem, (".parquet",))


def merge_files(paths: Sequence[Path], output: Path, about: dict[str, Any]) -> tuple[RoutingStats, list[Path]]:
    """Write the statistics of several runs as one, and their answers if every run has some.

    Counts are exact, moments up to float64 rounding. A key that only some parts admitted has the occurrences of those
    parts only. Documents that are in two parts count twice, which the files cannot reveal.

    Args:
        paths: statistics files, at least two.
        output: the statistics file to write; answers go next to it.
        about: added to the metadata.

    Returns:
        The statistics, and the parts without answers; unless there are none, no answers were written.

    Raises:
        InputError: the parts are of different models, their orders, layers or experts differ, or the answers of a
            part belong to other statistics.
    """
    if len(paths) < 2:
        raise InputError(f"merging needs at least two statistics files, got {[str(path) for path in paths]}")
    read = [statsfile.read(path) for path in paths]
    first = read[0][1]
    for path, (_, meta) in zip(paths, read, strict=True):
        for name in _SAME:
            if meta.get(name) != first.get(name):
                raise InputError(
                    f"{path}: {name} is {meta.get(name)}, but {first.get(name)} in {paths[0]}; "
                    "only statistics of the same layers of the same model merge"
                )
    without = [path for path in paths if not answers_next_to(path).is_file()]
    for path in [] if without else paths:
        answersfile.check_statistics(answers_next_to(path), path)
    parts = [] if without else [answersfile.read(answers_next_to(path))[0] for path in paths]
    try:
        together = reduce(stats.merge, (part for part, _ in read))
        averaged = reduce(answers.merge, parts) if parts else None
    except InputError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error

    merged = [
        {"file": str(path), "provenance": meta.get("provenance")} for path, (_, meta) in zip(paths, read, strict=True)
    ]
    meta = {name: first[name] for name in ("model", *_SAME) if name in first} | about | {"merged": merged}
    answers_next_to(output).unlink(missing_ok=True)  # those of other statistics, if any
    filled = reduce(dict.__or__, (part["filled"] for _, part in read))
    strings = reduce(dict.__or__, (statsfile.token_strings(path) for path in paths))
    statsfile.write(output, together, meta | {"filled": filled}, strings)
    if averaged is not None:
        answersfile.write(answers_next_to(output), averaged, meta | {"statistics": statsfile.identity(output)})
    return together, without


def _keys(
    model: Model, corpus: EncodedCorpus, settings: CollectSettings, work: Path, run: dict[str, Any], progress: bool
) -> tuple[ContextCounts, dict[str, Any]]:
    """The keys, and what the documents were that they were counted in; from the disk if the run got that far."""
    noted, saved = resumed(work / "run.json", run), Checkpoints(work / "keys")
    if noted is not None:
        like = ContextCounts(np.zeros(1), np.zeros(1), tuple(OrderCount(*[0] * 6) for _ in set(settings.keys.orders)))
        chosen = saved.newest(like)
        if chosen is not None:
            return chosen[1], noted
    wanted = settings._keys_of(model.config, len(settings._layers_of(model)))
    keys = choose_keys(model, corpus, settings.max_length, wanted, progress=progress)
    note(work / "run.json", run, corpus.about)
    saved.save(0, keys)
    return keys, corpus.about


def _check_same(now: dict[str, Any], before: dict[str, Any], work: Path) -> None:
    if now != before:
        raise CorpusError(
            f"the documents have changed since this run began: {now} now, {before} before; "
            f"delete {work.parent} to start over"
        )


def _wait(files: list[Path], progress: bool) -> None:
    """Until all of the files exist: the other processes' parts."""
    with progress_bar(total=len(files), desc="parts", unit="process", show=progress) as bar:
        while (there := sum(file.exists() for file in files)) < len(files):
            bar.update(there - bar.n)
            time.sleep(0.5)
