"""What a machine and its groups say of themselves, read from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatbind_cli import hardware


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: bf16", False),
    ],
)
def test_units_for_bfloat16_are_told_by_the_flags(
    line: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(hardware, "_CPUS", tmp_path / "cpuinfo")
    assert hardware.multiplies_bfloat16() is found
    monkeypatch.setattr(hardware, "_CPUS", tmp_path / "none")
    assert not hardware.multiplies_bfloat16()


def test_memory_is_the_least_of_machine_and_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
    assert hardware.memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n")
    assert hardware.memory() == (1000 << 10, 900 << 10)
    (tmp_path / "own").write_text("0::/job/step\n")
    for name, most in (("job/step", "max"), ("job", "500000")):
        group = tmp_path / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text("300000\n")
        (group / "memory.stat").write_text("anon 1\nactive_file 20000\ninactive_file 60000\n")
    assert hardware.memory() == (500_000, 280_000)
