"""The phase scripts, run in this process."""

from pathlib import Path

import pytest

from analysis.collect.answers import collect_answers
from analysis.collect.statistics import KeySettings, choose_keys, collect
from tests.running import run_python
from varjax import answersfile, statsfile
from varjax.tablefiles import answers_next_to

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="session")
def script():
    """`script(name, *arguments)`: run it as `__main__`; the name may be a path."""

    def run(name: str, *arguments: object) -> None:
        run_python([str(SCRIPTS / name), *map(str, arguments)])

    return run


@pytest.fixture(scope="session")
def common(model_directory, even_corpus):
    """With the engine whose programs compile fastest."""
    reading = ("--dataset", even_corpus, "--max_length", 32, "--batch_size", 4)
    return ("--model", model_directory, *reading, "--implementation", "reference")


@pytest.fixture(scope="session")
def statistics(saved_model, even_documents, tmp_path_factory):
    """A statistics file with its answers next to it, from the first 60 documents; to be read only."""
    known, reading = even_documents[:60], {"batch_size": 4, "max_length": 16, "progress": False}
    keys = choose_keys(saved_model, known, 16, KeySettings(orders=(1, 2), min_count=3))
    stats = collect(saved_model, known, keys, **reading)
    path = tmp_path_factory.mktemp("statistics") / "routing_stats.parquet"
    statsfile.write(path, stats, {"fingerprint": saved_model.fingerprint})
    answers = collect_answers(saved_model, known, stats.keys, range(2), **reading)
    about = {"fingerprint": saved_model.fingerprint, "statistics": statsfile.identity(path)}
    answersfile.write(answers_next_to(path), answers, about)
    return path
