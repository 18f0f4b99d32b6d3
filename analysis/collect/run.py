"""Phase 1 as one resumable run: choose the keys, collect their statistics, collect the answers at some of them.

What is finished is on disk: a run that was killed repeats only what came after its last checkpoint, and ends with the
same result. Of several processes each runs the model on its share of the documents and writes a part; the first one
merges them. They never talk, so they need no coordinator: they meet in a folder that all of them see, may begin and end
at different times, and one that was killed is started again by itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from analysis.collect.answers import collect_answers
from analysis.collect.checkpoints import Checkpoints, note, resumed
from analysis.collect.merging import merge_files
from analysis.collect.passes import EVERY_DOCUMENT, SAVE_TOKENS, Share, mesh_of
from analysis.collect.statistics import KeySettings, choose_keys, collect
from analysis.report.output import Output
from analysis.report.provenance import provenance
from analysis.text.corpus import CorpusError
from analysis.text.encoded_corpus import EncodedCorpus
from models import Model, MoEConfig
from varjax import answers, answersfile, statsfile
from varjax.errors import InputError
from varjax.files import remove
from varjax.keys import ContextCounts, OrderCount
from varjax.progress import progress_bar
from varjax.selection import likeliest
from varjax.stats import RoutingStats, bytes_a_key
from varjax.tablefiles import answers_next_to

STATS, TRACE = "routing_stats.parquet", "routing_trace.parquet"
WORK = "routing_checkpoints"  # the folder inside the output; removed by `finish`


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run, beside the model and the documents.

    Raises:
        InputError: naming every field that is out of range.
    """

    keys: KeySettings = dataclasses.field(default_factory=KeySettings)
    layers: tuple[int, ...] | None = None  # to collect statistics of; None: all
    residual_orders: tuple[int, ...] = (1, 2, 3)  # context orders that get answers; (): none does
    residual_min_count: int = 10  # occurrences that a key with answers needs
    stats_bytes: int = 1 << 32  # of statistics on each device: where they are more, fewer keys are admitted
    residual_bytes: int = 1 << 32  # of answers' sums on each device: where they are more, only the likeliest are taken
    batch_size: int = 8  # rows per device and batch at `max_length`
    max_length: int = 256  # tokens per window
    save_tokens: int = SAVE_TOKENS  # tokens between checkpoints

    def __post_init__(self) -> None:
        least = {"residual_min_count": 1, "stats_bytes": 0, "residual_bytes": 0}
        least |= {"batch_size": 1, "max_length": 2, "save_tokens": 1}
        faults = [
            f"{name}={getattr(self, name)}: expected at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        strange = sorted(set(self.residual_orders) - set(self.keys.orders))
        if strange:
            faults.append(f"residual orders {strange} are not among the orders {self.keys.orders}; collect those too")
        if faults:
            raise InputError("; ".join(faults))

    def layers_of(self, model: Model) -> tuple[int, ...]:
        """The layers to collect. Raises InputError for one that the model does not have."""
        every = range(model.config.num_layers)
        chosen = tuple(every) if self.layers is None else tuple(sorted(set(self.layers)))
        if not chosen or not set(chosen) <= set(every):
            raise InputError(f"layers {list(chosen)}: expected some of 0 to {len(every) - 1}, the layers of the model")
        return chosen

    def keys_of(self, config: MoEConfig, num_layers: int) -> KeySettings:
        """Which keys are worth a row, with as many as there is room for at most. Raises InputError if there is none."""
        one = bytes_a_key(num_layers, config.num_experts)
        room = self.stats_bytes // one
        if room < 1:
            raise InputError(f"stats_bytes={self.stats_bytes}: one key takes {one:,}; allow more, or fewer layers")
        most = room if self.keys.max_keys is None else min(self.keys.max_keys, room)
        return dataclasses.replace(self.keys, max_keys=most)

    def pairs_of(self, config: MoEConfig, num_layers: int) -> int:
        """For how many pairs of a key and an expert there is room in each layer, beside those of order 0."""
        one = answers.bytes_a_pair(num_layers, config.num_experts, config.hidden_size)
        return max(self.residual_bytes // one - config.num_experts, 0)


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
    settings: Settings,
    *,
    share: Share = EVERY_DOCUMENT,
    seed: int = 0,
    progress: bool = True,
) -> Analysis | None:
    """Write `routing_stats.parquet` and, if asked for, the experts' answers into `output`.

    Checkpoints are kept in `output/routing_checkpoints` until `finish` is called.

    Args:
        output: a directory, or the file of the statistics; see `place`.
        share: of the documents, where several processes divide them; the first one waits for the others' parts.
        seed: noted in the provenance; nothing here is drawn.
        progress: show bars on standard error.

    Returns:
        None in all processes but the first.

    Raises:
        InputError: no key, a layer that does not exist, or `output` holds the checkpoints of another run.
        CorpusError: the documents are not those that a resumed run began with.
    """
    layers = settings.layers_of(model)
    about = {"name": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype.name}
    run = {
        "model": about | {"implementation": model.engine.name},
        "data": corpus.request,
        "settings": dataclasses.asdict(settings),
        "processes": share.of,
        "devices": dict(mesh_of(model).shape),
    }
    at = place(output)
    works = [at.other(WORK) / f"process-{index}" for index in range(share.of)]
    work, alone = works[share.index], share.of == 1
    reading: dict[str, Any] = {name: getattr(settings, name) for name in ("batch_size", "max_length", "save_tokens")}
    reading["progress"] = progress

    keys, noted = _keys(model, corpus, settings, work, run, progress)
    order, num_experts = np.sum(keys.keys >= 0, axis=1), model.config.num_experts
    answerable = np.isin(order, settings.residual_orders) & (keys.counts >= settings.residual_min_count)
    room = settings.pairs_of(model.config, len(layers))
    answered = _most_frequent(answerable, keys.counts, room)  # more keys than pairs would be of no use
    pairs = min(room, len(answered) * num_experts)

    documents = share.documents(corpus)
    part = at if alone else place(work)
    own = part.main(".parquet")
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "top_k": model.config.top_k,
        "vocab_size": model.config.vocab_size,
        "layers": list(layers),
    }
    origin = {"provenance": provenance(seed=seed, model=about, data=noted, settings=run["settings"])}

    def statistics() -> None:
        saved = Checkpoints(work / "statistics")
        stats = collect(model, documents, keys, layers=layers, checkpoints=saved, **reading)
        _check_same(corpus.about, noted, work)
        strings = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer))) if model.tokenizer else None
        for companion in (answers_next_to(own), part.other(TRACE)):
            companion.unlink(missing_ok=True)  # of other statistics, that a former run left here
        statsfile.write(own, stats, meta | origin, strings)

    def residuals() -> None:
        chosen, wanted = keys.keys[answered], None
        if pairs < len(answered) * num_experts:
            wanted = likeliest(statsfile.read(own)[0], chosen, layers, pairs)
        saved = Checkpoints(work / "residuals")
        found = collect_answers(model, documents, chosen, layers, pairs=wanted, checkpoints=saved, **reading)
        _check_same(corpus.about, noted, work)
        named = {"statistics": statsfile.identity(own)}
        answersfile.write(answers_next_to(own), found, meta | origin | named)

    _once(work / "statistics.done", statistics)
    if len(answered):
        _once(work / "residuals.done", residuals)
    _once(work / "part.done", lambda: None)
    if share.index > 0:
        return None
    if not alone:
        _wait([path / "part.done" for path in works], progress)
        merge_files([path / STATS for path in works], at.main(".parquet"), origin)
    stats, _ = statsfile.read(at.main(".parquet"))
    return Analysis(stats, keys, len(answered), int(answerable.sum()), pairs)


def finish(output: Path) -> None:
    """Remove the checkpoints: everything that the run had to write is written."""
    remove(place(output).other(WORK))


def place(output: Path) -> Output:
    """Where a run writes: into a directory, or, for an output such as `runs/a.parquet`, next to that file.

    Raises:
        InputError: a file that is not Parquet, or something of the other kind is there.
    """
    return Output.of(output, Path(STATS).stem, (".parquet",))


def _keys(
    model: Model, corpus: EncodedCorpus, settings: Settings, work: Path, run: dict[str, Any], progress: bool
) -> tuple[ContextCounts, dict[str, Any]]:
    """The keys, and what the documents were that they were counted in; from the disk if the run got so far."""
    noted, saved = resumed(work / "run.json", run), Checkpoints(work / "keys")
    if noted is not None:
        chosen = saved.newest(_no_keys(settings.keys))
        if chosen is not None:
            return chosen[1], noted
    wanted = settings.keys_of(model.config, len(settings.layers_of(model)))
    keys = choose_keys(model, corpus, settings.max_length, wanted, progress=progress)
    note(work / "run.json", run, corpus.about)
    saved.save(0, keys)
    return keys, corpus.about


def _no_keys(settings: KeySettings) -> ContextCounts:
    """Of the structure that a checkpoint of keys has."""
    return ContextCounts(np.zeros(1), np.zeros(1), tuple(OrderCount(*[0] * 6) for _ in set(settings.orders)))


def _check_same(now: dict[str, Any], before: dict[str, Any], work: Path) -> None:
    if now != before:
        raise CorpusError(
            f"the documents have changed since this run began: {now} now, {before} before; "
            f"delete {work.parent} to begin anew"
        )


def _once(done: Path, make: Callable[[], None]) -> None:
    """Make what is not made yet, and note it in the file `done`."""
    if not done.exists():
        make()
        done.touch()


def _most_frequent(wanted: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """int64 [n]: the wanted rows bool [R], at most so many, the most frequent ones; in their order."""
    rows = np.flatnonzero(wanted)
    return np.sort(rows[np.argsort(-counts[rows], kind="stable")[:most]])


def _wait(files: list[Path], progress: bool) -> None:
    """Until all of the files are there: the other processes' parts."""
    with progress_bar(total=len(files), desc="parts", unit="process", show=progress) as bar:
        while (there := sum(file.exists() for file in files)) < len(files):
            bar.update(there - bar.n)
            time.sleep(0.5)
