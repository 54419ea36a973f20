"""The errors modicum raises. Each message names the value, the limit and the remedy."""


class ModicumError(Exception):
    """Base of everything modicum raises on purpose; the command line prints it without a traceback."""


class BudgetError(ModicumError, ValueError):
    """A budget (tokens, bytes, sinks, recent window, chunk) that cannot be kept."""


class PolicyError(ModicumError, ValueError):
    """An unknown policy, a bad setting of one, or a wrapper without a base."""


class ModelError(ModicumError, ValueError):
    """A model that is missing, is not a causal LM, or whose attention cannot be taken over."""


class InputError(ModicumError, ValueError):
    """A prompt, a mask or another argument that cannot be used."""


class CacheError(ModicumError, RuntimeError):
    """A cache used in a way it cannot serve, or whose integrity is broken."""


class TargetsError(ModicumError, ValueError):
    """Recorded targets that are incomplete, damaged, of another teacher or text, or of a newer format."""


class SnapshotError(ModicumError, ValueError):
    """A saved cache or saved head scores that are truncated, corrupted, foreign or of a newer format."""
