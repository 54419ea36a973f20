"""Long-context tasks: generators of the RULER kinds, loaders of known benchmarks, perplexity, metrics."""
