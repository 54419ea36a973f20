"""Sparse weights without training: a language model's linear layers pruned to a budget."""
