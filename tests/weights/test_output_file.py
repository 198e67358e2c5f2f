import errno
import os

import pytest

from chatbind_cli.weights import output_file
from chatbind_cli.weights.output_file import OutputFile

DATA = bytes(range(256)) * 1200


def write(path, sizes):
    file = OutputFile(path, len(DATA))
    left = memoryview(DATA)
    for size in sizes:
        file.write(left[:size])
        left = left[size:]
    file.write(bytes(left))
    file.close(sync=True)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("sizes", [(), (1,), (16_384,), (5, 70_000, 3)])
def test_what_goes_in_is_in_the_file_however_it_is_cut(tmp_path, monkeypatch, large, sizes):
    monkeypatch.setattr(output_file, "_LARGE_BYTES", 0 if large else 1 << 40)
    monkeypatch.setattr(output_file, "_BLOCK_BYTES", 16_384)
    write(tmp_path / "f", sizes)
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_file_system_that_refuses_direct_blocks_gets_them_the_other_way(tmp_path, monkeypatch):
    monkeypatch.setattr(output_file, "_LARGE_BYTES", 0)
    monkeypatch.setattr(output_file, "_BLOCK_BYTES", 16_384)
    monkeypatch.setattr(output_file, "_set_direct", lambda handle, on: on)
    plain, refused = os.write, []

    def refuse_once(handle, view):
        if not refused:
            refused.append(len(view))
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(handle, view)

    monkeypatch.setattr("os.write", refuse_once)
    write(tmp_path / "f", ())
    monkeypatch.undo()
    assert refused == [16_384]
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    def full(handle, begin, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        OutputFile(tmp_path / "f", 10)
    assert (tmp_path / "f").stat().st_size == 0
