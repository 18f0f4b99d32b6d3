"""What a model's routing does: corpora, collection, traces, hypotheses, quality, certificate and figures."""
