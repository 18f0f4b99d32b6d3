"""Search for the best configuration: space, objective, studies, validation."""
