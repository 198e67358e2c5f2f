"""Files and folders appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest

from chatbind_cli import files


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replace_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


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
