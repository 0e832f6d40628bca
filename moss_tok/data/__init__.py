"""Training data: grain pipelines whose every batch is a function of (seed, index)."""
