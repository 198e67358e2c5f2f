"""A disk that fills up costs a run one line, and nothing that it had saved before."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from chatbind_cli.errors import CheckpointError
from chatbind_cli.training.saved import saving
from chatbind_cli.training.watch import Watch

WORDS = ("--max-steps", "3", "--save-strategy", "steps", "--save-steps", "1")
SAYS = "cannot be saved: the disk is full, or files may not be as large; what was saved before "


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Has something happen in a step."""
    check = Watch.check

    def arrange(step: int, act: Callable[[], object]) -> None:
        def disturbed(self: Watch, norm: object, now: int, *, stop: bool) -> None:
            if now == step:
                act()
            check(self, norm, now, stop=stop)  # type: ignore[arg-type]

        monkeypatch.setattr(Watch, "check", disturbed)

    return arrange


def assert_saved(out: Path, step: int) -> None:
    assert [folder.name for folder in out.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (out / ".saving").exists()
    assert not (out / "model.safetensors").exists()


# the weights that train are 152 KB, the optimizer's two moments twice as much
@pytest.mark.parametrize("largest", [100_000, 200_000])
def test_files_that_may_not_be_as_large(world, here, tmp_path, at_step, largest) -> None:
    out = tmp_path / "out"
    words = ("finetune", *world.args(out, *WORDS))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1])))
    try:
        done = here(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 1
    assert SAYS in done.stderr.splitlines()[-1]
    assert_saved(out, 1)
    at_step(-1, lambda: None)
    again = here(*words)
    assert again.code == 0, again.stderr
    assert "going on from step 1 of 3" in again.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(world, here, small_disk, at_step) -> None:
    out = small_disk / "out"

    def fill() -> None:
        usage = os.statvfs(small_disk)
        size = usage.f_bavail * usage.f_frsize
        (small_disk / "filler").write_bytes(bytes(size - 300_000))

    words = ("finetune", *world.args(out, *WORDS))
    at_step(2, fill)
    done = here(*words)
    assert done.code == 1
    assert SAYS in done.stderr.splitlines()[-1]
    assert_saved(out, 1)
    at_step(-1, lambda: None)
    (small_disk / "filler").unlink()
    again = here(*words)
    assert again.code == 0, again.stderr
    assert "going on from step 1 of 3" in again.stderr


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: ... (os error 122)")],
)
def test_libraries_say_it_in_their_own_ways(tmp_path: Path, error: Exception) -> None:
    staging = tmp_path / ".saving"
    staging.mkdir()
    with pytest.raises(CheckpointError, match="the disk is full"), saving(staging):
        raise error
    assert not staging.exists()
    with pytest.raises(RuntimeError, match="CUDA"), saving(staging):
        raise RuntimeError("CUDA error")
