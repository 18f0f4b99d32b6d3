"""Run the whole method in 8 to 12 minutes: statistics and tests, presets, a policy under a loss budget, a comparison.

Runs the phase scripts on the reference model and the embedded corpus, and prints each command before running it. Tables
are built on the build split, the policy is chosen on the tune split, and everything is reported on the test split.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from analysis.command import HelpFormatter, program
from analysis.criteria import MAX_DEGRADATION
from analysis.evaluate.comparison import degradation, read_result
from analysis.report import figures
from analysis.report.html import INDEX, write_index
from varjax.config import PRESETS

HERE, OUT = Path(__file__).parent, Path("results/demo")
BUILD_SAMPLES, TEST_SAMPLES = "1800", "200"
POLICY = "policy"


@program
def main(arguments: Sequence[str] | None) -> None:
    """Run the program."""
    argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter).parse_args(arguments)
    started = time.monotonic()
    stats = str(OUT / "routing_stats.parquet")
    _script("01_routing_analysis.py", "--num_samples", BUILD_SAMPLES, "--output", str(OUT))
    _python("-m", "analysis.hypothesis_validation", "--input", stats, "--output", str(OUT / "hypotheses"))
    _evaluate("baseline", "--mode", "baseline")
    for preset in PRESETS:
        _evaluate(preset, "--mode", "var", "--routing_stats", stats, "--preset", preset)
    _evaluate(POLICY, "--mode", "var", "--routing_stats", stats, "--search_policy")
    _script(
        "02_evaluate_var.py",
        *("--compare", str(OUT / "baseline.json"), str(OUT / f"{POLICY}.json")),
        *("--output", str(OUT / "comparison.json")),
    )
    _overview()
    write_index(OUT)
    print(f"\n{time.monotonic() - started:.0f} s; {OUT / INDEX} links the pages of all runs")


def _evaluate(name: str, *arguments: str) -> None:
    brief = ("--num_samples", TEST_SAMPLES, "--tune_samples", "80", "--repeats", "11")
    _script("02_evaluate_var.py", *arguments, *brief, "--output", str(OUT / f"{name}.json"))


def _script(name: str, *arguments: str) -> None:
    """Run a phase script as a user would."""
    _python(str(HERE / name), *arguments)


def _python(*arguments: str) -> None:
    """Print a command as typed in the project's root and run it; end with its exit status if it fails."""
    print(f"\n$ python {shlex.join(arguments).replace(str(HERE), HERE.name)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _overview() -> None:
    """Print and draw all settings next to each other."""
    base = read_result(OUT / "baseline.json")
    points = {"plain model": [(base.fields["experts_per_token"], 0.0)]}
    print(
        f"\n{'':14}{'perplexity':>11}{'experts':>9}{'fast':>7}{'cached':>8}{'learned':>9}{'prefill':>10}{'decode':>9}"
    )
    for name in (*PRESETS, POLICY):
        result = read_result(OUT / f"{name}.json")
        change, fields = degradation(base, result), result.fields
        tiers, speedup = fields["tiers"], fields["throughput"]["speedup"]
        points[name] = [(fields["experts_per_token"], change.value)]
        print(
            f"{name:14}{change.value:>+11.2%}{fields['experts_per_token']:>9.2f}"
            f"{tiers['fast']:>7.0%}{tiers['cached']:>8.0%}{tiers['learned']:>9.0%}"
            f"{speedup['prefill']['value']:>9.2f}x{speedup['decode']['value']:>8.2f}x"
        )
    caption = f"Held-out documents ({base.fields['tokens']:,} tokens of {base.fields['documents']:,} documents)"
    figures.save(figures.quality_against_experts(points, MAX_DEGRADATION, caption), OUT, "quality_experts")


if __name__ == "__main__":
    main()
