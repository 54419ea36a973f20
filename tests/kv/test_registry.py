"""Policies by name: registration, listing, and the parser of policy expressions."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import modicum.kv.policies  # noqa: F401  # registers them
from modicum.errors import PolicyError
from modicum.kv import registry
from modicum.kv.policies.calibrated import Calibrated
from modicum.kv.policies.keydiff import KeyDiff
from modicum.kv.policies.knorm import Knorm
from modicum.kv.policies.learned import Learned
from modicum.kv.policies.random import Random
from modicum.kv.policies.snapkv import SnapKV
from modicum.kv.policies.tova import TOVA
from modicum.kv.policy import Policy, Wrapper
from modicum.kv.registry import alias, parse_policy, policies, register
from modicum.kv.view import View
from tests.kv.views import make_view


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))


@dataclass(frozen=True)
class Outer(Wrapper):
    """Twice the base's score."""

    name: ClassVar[str] = "outer"
    times: int = 2

    def score(self, view: View) -> Tensor:
        return self.times * self.base.score(view)


@dataclass(frozen=True)
class Inner(Wrapper):
    """The base's score plus one."""

    name: ClassVar[str] = "inner"

    def score(self, view: View) -> Tensor:
        return self.base.score(view) + 1


@pytest.fixture
def wrappers() -> None:
    register(Outer)
    register(Inner)


def refusal(text: object) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("keydiff", KeyDiff()),
        ("KeyDiff", KeyDiff()),
        ("  keydiff\n", KeyDiff()),
        ("keydiff()", KeyDiff()),
        ("keydiff(metric='l2')", KeyDiff(metric="l2")),
        ("keydiff(metric=l2, anchor_window=4096)", KeyDiff(metric="l2", anchor_window=4096)),
        ("keydiff(anchor_window=None)", KeyDiff()),
        ("manifoldkv", KeyDiff(metric="l2")),
        ("ManifoldKV(anchor_window=4096)", KeyDiff(metric="l2", anchor_window=4096)),
        ("snapkv(window=16, floor=True, over=max)", SnapKV(window=16, floor=True, over="max")),
        ("auto", Calibrated(Learned(), otherwise=KeyDiff(metric="l2"))),
        ("auto(fraction=0.5)", Calibrated(Learned(), otherwise=KeyDiff(metric="l2"), fraction=0.5)),
        ("random(seed=7)", Random(seed=7)),
        ("tova(heads=each)", TOVA(heads="each")),
    ],
)
def test_texts_that_name_a_policy(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy
    assert parse_policy(policy) is policy


@pytest.mark.usefixtures("wrappers")
@pytest.mark.parametrize(
    "text",
    [
        "outer+inner+snapkv(window=8)",
        "outer(inner(snapkv(window=8)))",
        "outer(inner+snapkv(window=8))",
        "outer+inner(snapkv(window=8))",
        "outer+(inner+snapkv(window=8))",
        "outer(base=inner(base=snapkv(window=8)))",
    ],
)
def test_every_way_to_nest_gives_the_same(text: str) -> None:
    policy = parse_policy(text)
    assert policy == Outer(Inner(SnapKV(window=8)))
    assert str(policy) == "outer(inner(snapkv(window=8)))"


@pytest.mark.usefixtures("wrappers")
def test_the_leftmost_is_the_outermost() -> None:
    view = make_view()
    base = Knorm().score(view)
    assert torch.equal(parse_policy("outer+inner+knorm").score(view), 2 * (base + 1))
    assert torch.equal(parse_policy("inner+outer(times=3)+knorm").score(view), 3 * base + 1)
    assert parse_policy("outer+manifoldkv") == Outer(KeyDiff(metric="l2"))
    assert parse_policy("outer(base=manifoldkv)") == Outer(KeyDiff(metric="l2"))


def test_adakv_around_caote_around_snapkv() -> None:
    policy = parse_policy("adakv+caote+snapkv")
    names = []
    while isinstance(policy, Wrapper):
        names.append(policy.name)
        policy = policy.base
    assert [*names, policy.name] == ["adakv", "caote", "snapkv"]


@pytest.mark.usefixtures("wrappers")
def test_wrappers_take_every_head_s_own_base() -> None:
    assert parse_policy("outer+tova") == Outer(TOVA(heads="each"))


@pytest.mark.usefixtures("wrappers")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keydif", ["no policy 'keydif'", "did you mean keydiff"]),
        ("manifold", ["did you mean manifoldkv"]),
        ("snap", ["did you mean", "snapkv"]),
        ("zzzzzz", ["there are: ", "ahakv", "streamingllm"]),
        ("outer+keydif", ["did you mean keydiff"]),
        ("outer(base=keydif)", ["did you mean keydiff"]),
        ("snapkv(windw=3)", ["snapkv has no setting 'windw'", "did you mean window"]),
        ("snapkv(x=3)", ["it takes floor, group, kernel, over, pooling, window"]),
        ("knorm(x=3)", ["it takes none"]),
        ("snapkv(window=0)", ["snapkv: window is 0", "at least 1"]),
        ("snapkv(window='8')", ["window is '8'"]),
        ("tova(heads=full)", ["heads is 'full'", "layer, each"]),
        ("outer", ["outer wraps another policy", "'outer+snapkv'"]),
        ("outer+inner", ["inner wraps another policy"]),
        ("outer(base=3)", ["got 3"]),
        ("outer(snapkv)+knorm", ["one base, got 2: snapkv, knorm"]),
        ("outer(snapkv, base=knorm)", ["got 2"]),
        ("outer(snapkv, knorm)", ["got 2"]),
        ("keydiff+snapkv", ["keydiff is not a wrapper and cannot go around snapkv"]),
        ("keydiff(snapkv)", ["not a wrapper"]),
        ("keydiff(base=snapkv)", ["not a wrapper"]),
        ("snapkv(16)", ["needs its name, as in snapkv(window=32)"]),
        ("snapkv(window=8, window=9)", ["window is set twice"]),
        ("snapkv(**{})", ["** is not allowed"]),
        ("snapkv(window={[]: 1})", ["cannot read the setting window"]),
        ("snapkv(window=8", ["cannot read the policy 'snapkv(window=8'"]),
        ("snapkv+", ["cannot read"]),
        ("snapkv-knorm", ["cannot read"]),
        ("snapkv.window", ["cannot read"]),
        ("__import__('os')", ["cannot read"]),
        ("snapkv(window=__import__('os'))", ["cannot read"]),
        ("snap\0kv", ["cannot read"]),
        ("", ["a policy is a name such as 'keydiff' or a Policy object, not ''"]),
        ("  ", ["not '  '"]),
        (None, ["not None"]),
        (SnapKV, ["a Policy object, not"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(text: object, words: list[str]) -> None:
    message = refusal(text)
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["(" * 400 + "knorm", "caote+" * 3000 + "knorm", "-" * 3000 + "knorm"])
def test_expressions_too_deep_are_refused(text: str) -> None:
    assert "cannot read the policy" in refusal(text)


_WORDS = ["knorm", "snapkv", "caote", "manifoldkv", "window", "base", "'l2'", "-1", "None", "lambda "]
_WORDS += list("==(())++,8[]{}*.:\0")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(_WORDS), max_size=12).map("".join))
def test_any_text_gives_a_policy_or_a_policy_error(text: str) -> None:
    with suppress(PolicyError):
        assert isinstance(parse_policy(text), Policy)


def test_names_that_are_taken_or_missing() -> None:
    @dataclass(frozen=True)
    class Other(Policy):
        name: ClassVar[str] = "snapkv"

    with pytest.raises(PolicyError, match=r"'snapkv' is taken by modicum\.kv\.policies\.snapkv\.SnapKV"):
        register(Other)
    namesake = dataclass(frozen=True)(
        type("SnapKV", (Policy,), {"name": "snapkv", "__module__": "elsewhere"})
    )
    with pytest.raises(PolicyError, match="is taken"):
        register(namesake)
    with pytest.raises(PolicyError, match="Policy has no name"):
        register(Policy)


def test_one_s_own_policy_by_name() -> None:
    @register
    @dataclass(frozen=True)
    class Stride(Policy):
        name: ClassVar[str] = "stride"
        summary: ClassVar[str] = "Keeps every so many tokens."
        every: int

        def score(self, view: View) -> Tensor:
            return -(view.positions % self.every).float()

    register(Stride)  # again, as in a notebook's cell run twice
    view = make_view()
    assert torch.equal(parse_policy("stride(every=4)").score(view), -(view.positions % 4).float())
    assert "stride needs its setting 'every'" in refusal("stride")
    info = policies()[-1]
    assert (info.name, info.summary, info.wrapper, info.settings) == ("stride", Stride.summary, False, {})
    alias("quarter", "stride(every=4)")
    assert parse_policy("quarter") == Stride(4)
    assert parse_policy("Quarter(every=8)") == Stride(8)


def test_the_list_of_policies() -> None:
    listed = {info.name: info for info in policies()}
    assert {
        "ahakv",
        "full",
        "h2o",
        "keydiff",
        "knorm",
        "random",
        "snapkv",
        "streamingllm",
        "tova",
    } <= set(listed)
    assert listed["keydiff"].settings == {"metric": "cosine", "anchor_window": None}
    assert listed["snapkv"].settings["window"] == 32
    for info in listed.values():
        assert info.title
        assert info.paper
        assert info.summary
        assert "base" not in info.settings
        if not info.wrapper:
            assert isinstance(parse_policy(info.name), Policy)
