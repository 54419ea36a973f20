"""Names of processors."""

from __future__ import annotations

from modicum.measure import processor_name

TEXT = "processor\t: 0\nmodel name\t: Some CPU (R) 3.2 GHz\nflags\t\t: avx2 fma\n"


def test_a_name_holds_model_features_and_threads() -> None:
    name = processor_name(2, TEXT)
    assert name.startswith("some-cpu-r-3-2-ghz-")
    assert name.endswith("-2")
    assert name == processor_name(2, TEXT.replace("avx2 fma", "fma avx2"))
    others = {processor_name(1, TEXT), processor_name(2, TEXT.replace("fma", "avx512f"))}
    assert name not in others
    assert len(others) == 2


def test_a_machine_without_cpuinfo_has_a_name() -> None:
    assert processor_name(1, "").endswith("-1")
    assert processor_name(1) == processor_name(1)
    arm = "CPU implementer\t: 0x41\nFeatures\t: fp asimd asimddp\n"
    assert processor_name(1, arm) != processor_name(1, arm.replace(" asimddp", ""))
