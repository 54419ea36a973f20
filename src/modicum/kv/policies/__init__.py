"""One file per method: its paper, its equation, one dataclass, one score."""
