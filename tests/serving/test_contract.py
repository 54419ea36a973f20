"""What modicum relies on in vLLM's backends for GPUs, which cannot run here: names, signatures, layouts."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("vllm", reason="run by `make test-vllm`, in an environment that has vLLM")

BACKENDS = {"cpu": "cpu_attn", "flash": "flash_attn", "triton": "triton_attn"}


@pytest.fixture(params=BACKENDS)
def backends(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """modicum's class for a backend, and vLLM's."""
    ours = importlib.import_module(f"modicum.vllm.{request.param}").ArenaBackend
    module = importlib.import_module(f"vllm.v1.attention.backends.{BACKENDS[request.param]}")
    return ours, module.__dict__[ours.__mro__[2].__name__]


def test_ours_stands_in_vllms_place(backends: tuple[Any, Any]) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from modicum.vllm import register

    ours, theirs = backends
    assert ours.get_name() == theirs.get_name()
    register()
    assert AttentionBackendEnum[ours.get_name()].get_class() is ours
    for get in ("get_impl_cls", "get_builder_cls"):
        assert issubclass(getattr(ours, get)(), getattr(theirs, get)())
        assert not inspect.isabstract(getattr(ours, get)())


def test_methods_that_are_overridden_are_those_that_vllm_calls(backends: tuple[Any, Any]) -> None:
    from modicum.vllm import arena

    _, theirs = backends
    impl, builder = theirs.get_impl_cls(), theirs.get_builder_cls()
    for of, name, ours in ((impl, "forward", arena.Impl), (builder, "build", arena.Builder)):
        assert list(inspect.signature(getattr(of, name)).parameters) == list(
            inspect.signature(getattr(ours, name)).parameters
        )
    assert list(inspect.signature(builder).parameters) == list(inspect.signature(arena.Builder).parameters)
    assert list(inspect.signature(builder.get_cudagraph_support).parameters) == [
        "vllm_config",
        "kv_cache_spec",
    ]
    assert list(inspect.signature(theirs.customize_spec).parameters) == ["spec"]


def test_what_is_read_of_them_is_there(backends: tuple[Any, Any]) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    _, theirs = backends
    impl = inspect.getsource(theirs.get_impl_cls().__init__)
    for name in (
        "scale",
        "num_heads",
        "num_kv_heads",
        "sliding_window",
        "alibi_slopes",
        "sinks",
        "attn_type",
    ):
        assert f"self.{name} =" in impl
    assert "self.logits_soft_cap =" in impl
    assert "self.kv_sharing_target_layer_name =" in impl
    fields = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    assert fields > {
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "query_start_loc_cpu",
        "slot_mapping",
        "max_seq_len",
    }
    # Keys and values are written by the slot mapping, apart from attention.
    assert not theirs.forward_includes_kv_cache_update


@pytest.mark.parametrize("name", ["flash", "triton"])
def test_the_layout_of_pages(name: str) -> None:
    """[pages, H, block, 2 D]: a token's key, then its value."""
    module = importlib.import_module(f"vllm.v1.attention.backends.{BACKENDS[name]}")
    theirs = importlib.import_module(f"modicum.vllm.{name}").ArenaBackend.__mro__[2]
    assert theirs.__module__ == module.__name__
    source = inspect.getsource(theirs.get_impl_cls())
    assert "[num_blocks, num_kv_heads, block_size, 2 * head_size]" in source
    assert "key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in source
