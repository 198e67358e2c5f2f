"""Files and folders appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest
from safetensors import SafetensorError

from chatbind_cli import files
from chatbind_cli.errors import UsageError


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replace_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, error):
    path = tmp_path / "f"
    with pytest.raises(OSError, match=f"No space left.*{path}'"), files.replace_file(path):
        raise error
    assert os.listdir(tmp_path) == []


def test_success_replaces_the_file_with_the_user_s_own_permissions(tmp_path):
    path = tmp_path / "sub" / "f"
    with files.replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CACHED_FROM_BYTES", 1)
    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert files.sha256_file(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(files, "_hash", lambda path: "hashed again")
    assert files.sha256_file(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert files.sha256_file(path) == "hashed again"


def test_an_output_that_is_an_input_or_holds_one_is_refused(tmp_path):
    inner = tmp_path / "data" / "in.jsonl"
    inner.parent.mkdir()
    inner.write_text("")
    link = tmp_path / "link"
    link.symlink_to(inner)
    for output, given, how in (
        (link, inner, "is"),
        (inner, link, "is"),
        (inner.parent, inner.parent, "is"),
        (inner.parent, link, "holds"),
    ):
        with pytest.raises(UsageError, match=f"the output {how} the input"):
            files.refuse_overlap(output, [given])
    harmless = ["-", None, "https://host/x", tmp_path / "absent", "/dev/null"]
    files.refuse_overlap(tmp_path / "out.jsonl", [inner, *harmless])
    files.refuse_overlap("/dev/null", [os.devnull])
