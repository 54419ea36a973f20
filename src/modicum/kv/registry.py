"""The policies by name: registering, listing, and reading "caote+snapkv" or "caote(snapkv(window=32))"."""

from __future__ import annotations

import ast
import difflib
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Any, TypeVar

from modicum.errors import PolicyError
from modicum.kv.policy import Policy, Wrapper

P = TypeVar("P", bound=type[Policy])

_REGISTRY: dict[str, type[Policy]] = {}
_ALIASES: dict[str, str] = {}
_POLICIES = ("base", "otherwise")  # settings whose value is a policy


@dataclass(frozen=True)
class PolicyInfo:
    """One line of `modicum.policies()`."""

    name: str
    title: str
    paper: str
    summary: str
    wrapper: bool
    settings: dict[str, Any]
    """Setting -> default, the base of a wrapper left out."""
    also: dict[str, str]
    """Other names that lead to this policy -> the expression that each stands for."""


def register(cls: P) -> P:
    """Class decorator: makes the policy known by its `name`."""
    if not cls.name:
        raise PolicyError(f"{cls.__name__} has no name: set the class attribute `name`")
    known = _REGISTRY.get(cls.name)
    # The same class again (a module reloaded, a notebook's cell run twice) takes the place of the old one.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        whose = f"{known.__module__}.{known.__qualname__}"
        raise PolicyError(f"the name {cls.name!r} is taken by {whose}: choose another")
    _REGISTRY[cls.name] = cls
    return cls


def alias(name: str, text: str) -> None:
    """Make `name` stand for the policy expression `text`."""
    _ALIASES[name] = text


def _load() -> None:
    """Register modicum's own policies. Late, since their files import this one."""
    import_module("modicum.kv.policies")


def policies() -> list[PolicyInfo]:
    """Every registered policy, in the order of registration."""
    _load()
    return [
        PolicyInfo(
            name=cls.name,
            title=cls.title,
            paper=cls.paper,
            summary=cls.summary,
            wrapper=issubclass(cls, Wrapper),
            settings={
                f.name: f.default for f in fields(cls) if f.name != "base" and f.default is not MISSING
            },
            also={name: text for name, text in _ALIASES.items() if parse_policy(text).name == cls.name},
        )
        for cls in _REGISTRY.values()
    ]


def parse_policy(text: str | Policy) -> Policy:
    """The policy that a text names; a policy comes back as it is.

    "keydiff", "snapkv(window=16)", "caote(snapkv(window=16))", or with `+` for wrappers: "adakv+caote+snapkv"
    is adakv(caote(snapkv)).

    Raises:
        PolicyError: an unknown name (with near ones), an unknown or bad setting, a wrapper without a base.
    """
    _load()
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str) or not text.strip():
        raise PolicyError(f"a policy is a name such as 'keydiff' or a Policy object, not {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _build(tree.body, text, base=None)
    except (SyntaxError, RecursionError, MemoryError) as error:  # what ast.parse raises, by its documentation
        raise _unreadable(text) from error


def _unreadable(text: str) -> PolicyError:
    return PolicyError(f"cannot read the policy {text!r}: write it like 'caote(snapkv(window=32))'")


def _build(node: ast.expr, text: str, base: Policy | None) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        # a + b + c parses as (a + b) + c; the rightmost is the innermost base.
        return _build(node.left, text, _build(node.right, text, base))
    if isinstance(node, ast.Name):
        return _make(node.id, [], {}, base)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(isinstance(argument, ast.Constant) for argument in node.args):
            raise PolicyError(
                f"cannot read the policy {text!r}: a setting needs its name, as in snapkv(window=32)"
            )
        arguments = [_build(argument, text, None) for argument in node.args]
        settings: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise PolicyError(f"cannot read the policy {text!r}: ** is not allowed")
            if keyword.arg in settings:
                raise PolicyError(f"cannot read the policy {text!r}: {keyword.arg} is set twice")
            settings[keyword.arg] = _value(keyword.arg, keyword.value, text)
        if isinstance(settings.get("base"), Policy):
            arguments.append(settings.pop("base"))
        return _make(node.func.id, arguments, settings, base)
    raise _unreadable(text)


def _value(key: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call | ast.BinOp) or (isinstance(node, ast.Name) and key in _POLICIES):
        return _build(node, text, None)
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise PolicyError(
            f"cannot read the setting {key} in the policy {text!r}: use numbers, text or True/False"
        ) from error


def _make(name: str, arguments: list[Policy], settings: dict[str, Any], base: Policy | None) -> Policy:
    name = name.lower()
    if name in _ALIASES:
        made = parse_policy(_ALIASES[name])
        settings = {**made.settings(), **settings}
        name = made.name
    cls = _REGISTRY.get(name)
    if cls is None:
        near = difflib.get_close_matches(name, [*_REGISTRY, *_ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(_REGISTRY))}"
        raise PolicyError(f"there is no policy {name!r}: {hint}")
    given = arguments + ([base] if base is not None else [])
    if len(given) > 1:
        raise PolicyError(f"{name} takes one base, got {len(given)}: {', '.join(map(str, given))}")
    known = {f.name for f in fields(cls)}
    if given:
        if "base" not in known:
            raise PolicyError(
                f"{name} is not a wrapper and cannot go around {given[0]}: write '{name}' alone"
            )
        settings = {**settings, "base": given[0]}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"it takes {', '.join(sorted(known)) or 'none'}"
            )
            raise PolicyError(f"{name} has no setting {key!r}: {hint}")
    for f in fields(cls):
        if f.name not in settings and f.default is MISSING and f.default_factory is MISSING:
            raise PolicyError(f"{name} needs its setting {f.name!r}: write '{name}({f.name}=…)'")
    return cls(**settings)
