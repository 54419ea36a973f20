"""Long-context tasks: generators of the RULER kinds, loaders of known benchmarks, perplexity, metrics."""

from modicum.tasks.expression import GROUPS, KINDS, parse_task
from modicum.tasks.sample import Sample, Task

__all__ = ["GROUPS", "KINDS", "Sample", "Task", "parse_task"]
