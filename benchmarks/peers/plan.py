"""Plan: the methods and their settings in each system."""

from __future__ import annotations

from dataclasses import dataclass

from job import Setting

FULL = "full"
SLIDING = "sliding window"


@dataclass(frozen=True)
class Method:
    """One method, by its press and by our policy; None where a system has none."""

    title: str
    press: str | None
    policy: str | None


METHODS = (
    Method("KeyDiff", "KeyDiffPress", "keydiff"),
    Method("Knorm", "KnormPress", "knorm"),
    Method("TOVA", "TOVAPress", "tova"),
    Method("StreamingLLM", "StreamingLLMPress", "streamingllm"),
    Method("SnapKV", "SnapKVPress", "snapkv"),
    Method("PyramidKV", "PyramidKVPress", "pyramidkv+snapkv"),
    Method("CriticalKV(SnapKV)", "CriticalKVPress(SnapKVPress)", "criticalkv+snapkv"),
    Method("Ada-KV(SnapKV)", "AdaKVPress(SnapKVPress)", "adakv+snapkv"),
    Method("Ada-KV(KeyDiff)", "AdaKVPress(KeyDiffPress)", "adakv+keydiff"),
    Method("CAOTE(SnapKV)", None, "caote+snapkv"),
    Method("RazorAttention (ManifoldKV)", None, "razor(base=manifoldkv,strong=0.2)"),
    Method("Expected attention", "ExpectedAttentionPress", None),
    Method("Ada-KV(expected attention)", "AdaKVPress(ExpectedAttentionPress)", None),
    Method("Compactor", "CompactorPress", "compactor(window=16)"),
    Method("KVzip", "KVzipPress", None),
    Method("KVzip+", "KVzipPress(kvzip_plus_normalization=True)", None),
    Method("auto", None, "auto"),
    Method("Calibrated KeyDiff", None, "calibrated+keydiff"),
)
"""In the order of the tables."""

QUANTISED = ("QuantizedCache(quanto, 4 bits)", "QuantizedCache(quanto, 2 bits)", "QuantizedCache(fp8)")


def title_of(name: str) -> str:
    """The method of a press or a policy; the name itself where it is none of the table."""
    for method in METHODS:
        if name in (method.press, method.policy):
            return method.title
    return name


def label(share: float, grown: bool = False) -> str:
    """A budget for people: "12.5%", or "12.5%+answer" with room for question and answer on top."""
    return f"{100 * share:g}%" + "+answer" * grown


def kvpress_settings(methods: list[Method], shares: list[float]) -> list[Setting]:
    """No press, then every press at every share."""
    presses = [m.press for m in methods if m.press]
    return [Setting(FULL, FULL)] + [Setting(p, label(s), s) for s in shares for p in presses]


def transformers_settings(shares: list[float], chunk: int) -> list[Setting]:
    """The plain cache, a sliding window at every share (in one call, and in chunks), quantised caches."""
    windows = [Setting(SLIDING, label(s), s, c) for s in shares for c in (None, chunk)]
    return [Setting(FULL, FULL), *windows, *(Setting(name, "quantised") for name in QUANTISED)]


def our_settings(methods: list[Method], shares: list[float], chunk: int) -> list[Setting]:
    """The full cache; every policy in chunks and in one shot at a press's bytes, and in one shot with room
    for question and answer on top and few protected tokens, as a press has it.
    """
    made = [Setting(FULL, FULL, None, chunk), Setting(FULL, FULL)]
    for share in shares:
        for policy in (m.policy for m in methods if m.policy):
            made += [
                Setting(policy, label(share), share, chunk),
                Setting(policy, label(share), share),
                Setting(policy, label(share, grown=True), share, grown=True),
            ]
    return made
