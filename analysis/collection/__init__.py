"""Passes of the model over a corpus: routing statistics, residual rows, checkpoints, parts that merge."""
