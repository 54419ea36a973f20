"""Kernels: attention and eviction in Triton, each with a twin in plain torch. `dispatch` is the door."""
