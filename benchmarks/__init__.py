"""Benchmarks of this repository, each a command: `python -m benchmarks.experts --help`. None of them is shipped."""
