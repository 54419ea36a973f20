"""Long-context tasks: generators of the RULER kinds, loaders of known benchmarks, perplexity, metrics."""

from modicum.tasks.expression import GROUPS, KINDS, parse_task
from modicum.tasks.metrics import METRICS, find_metric
from modicum.tasks.sample import Sample, Task

__all__ = ["GROUPS", "KINDS", "METRICS", "Sample", "Task", "find_metric", "parse_task"]
