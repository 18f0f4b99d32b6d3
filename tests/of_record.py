"""The commands that the project was specified with, in small, in the working directory, as `python -m tests.of_record`.

In a process of its own: all but the search by a Gaussian process must do without torch, and a process of pytest may
have imported it before.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import pytest

COMMANDS = """
python experiments/01_routing_analysis.py --model reference --dataset embedded --num_samples 10000 --output results/routing_stats.parquet
python analysis/hypothesis_validation.py --input results/routing_stats.parquet --output results/validation_report.txt
python experiments/02_evaluate_var.py --mode baseline --output results/phase2/baseline.json
python experiments/02_evaluate_var.py --mode var --routing_stats results/routing_stats.parquet --output results/phase2/var.json
python experiments/02_evaluate_var.py --compare results/phase2/baseline.json results/phase2/var.json
python experiments/03_hyperparameter_optimization.py --method bayesian --n_calls 50 --output results/phase3/
python experiments/03_hyperparameter_optimization.py --validate results/phase3/best_config.json --output results/phase3/
python experiments/05_systems_analysis.py --var_config results/phase3/best_config.json --output results/phase5/
python experiments/05_systems_analysis.py --quick --output results/phase5/
"""  # noqa: E501 (to be given as they are written)
LESS = {"batch_size": 4, "max_length": 64, "validate_samples": 24, "num_samples": 24}  # than what is left to defaults
NEEDS_TORCH = "--method bayesian"


@contextmanager
def torch_hidden() -> Iterator[None]:
    """As where torch is not installed."""
    find = PathFinder.find_spec

    def find_other(name: str, path: Any = None, target: Any = None) -> Any:
        return None if name == "torch" else find(name, path, target)

    imported = sys.modules.pop("torch", None)
    with patched.object(PathFinder, "find_spec", find_other):
        yield
    if imported is not None:
        sys.modules["torch"] = imported


def main() -> None:
    with torch_hidden():
        from tests import stage
        from tests.running import run_python
        from varjax import config

    with pytest.MonkeyPatch.context() as patch:
        stage.stage(Path.cwd(), patch)
        stage.FEWER.update(LESS)
        patch.setattr(stage, "TRIALS", 2)  # each compiles programs for the context orders that it looks at
        with torch_hidden():
            stage.shrink(patch)
        # Every preset has a table of its own shape, for which programs are compiled.
        patch.setattr(config, "PRESETS", {"balanced": config.PRESETS["balanced"]})
        for command in COMMANDS.strip().splitlines():
            print(f"\n$ {command}", flush=True)
            words = shlex.split(command)[1:]
            with nullcontext() if NEEDS_TORCH in command else torch_hidden():
                run_python(words)


if __name__ == "__main__":
    main()
