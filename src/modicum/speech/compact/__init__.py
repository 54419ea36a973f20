"""Compact speech recognizers: shared layers, sparse weights and few bits in one small file."""
