"""From texts to batches of token ids: corpora, splits, tokenized corpora on disk, windows."""
