"""Passes of the model over a corpus: routing statistics, answers, checkpoints, parts that merge."""
