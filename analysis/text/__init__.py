"""From texts to batches of token ids: corpora, splits, tokenised corpora on disk, windows."""
