"""What a trace says of routing: estimators on held-out documents, with intervals and permutation nulls."""
