"""Who made a folder: only what its record names is ever replaced."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli import folders
from chatbind_cli.errors import ChatBindError
from chatbind_cli.folders import RECORD, note_made, refuse_foreign, remove_made, replace_folder


def tree(root: Path) -> dict[str, object]:
    """Everything below a folder: links, folders, and the bytes of files."""
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(root.rglob("*"))
    }


def made(path: Path, text: str = "old") -> Path:
    with replace_folder(path, made_by="toy", overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "f").write_text(text)
        (temporary / "sub" / "g").write_text(text)
    return path


def test_a_folder_is_replaced_only_with_overwrite_and_leaves_no_litter(tmp_path: Path) -> None:
    path = made(tmp_path / "d")
    with pytest.raises(ChatBindError, match="--overwrite"), replace_folder(path, made_by="toy"):
        pass
    made(path, "new")
    assert (path / "sub" / "g").read_text() == "new"
    assert os.listdir(tmp_path) == ["d"]


def test_a_copy_and_a_moved_folder_are_as_much_ours(tmp_path: Path) -> None:
    made(tmp_path / "d").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    made(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "moved" / "f").read_text() == "new"


def user_file(path: Path) -> None:
    (path / "sub" / "thesis.txt").write_text("mine")


def link_in_place_of_a_file(path: Path) -> None:
    (path / "f").unlink()
    (path / "f").symlink_to(path.parent / "elsewhere" / "f")


def link_in_place_of_a_folder(path: Path) -> None:
    (path / "sub" / "g").unlink()
    (path / "sub").rmdir()
    (path / "sub").symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    (path / "f").unlink()
    os.mkfifo(path / "f")


def no_record(path: Path) -> None:
    (path / RECORD).unlink()


def linked_record(path: Path) -> None:
    (path / RECORD).rename(path.parent / "record")
    (path / RECORD).symlink_to(path.parent / "record")


def broken_record(path: Path) -> None:
    (path / RECORD).write_bytes(b"\xff[")


def empty_folder_of_the_user(path: Path) -> None:
    (path / "sub" / "notes").mkdir()


def made_folder_in_it(path: Path) -> None:
    made(path / "mine")


FOREIGN = [
    user_file,
    link_in_place_of_a_file,
    link_in_place_of_a_folder,
    pipe,
    no_record,
    linked_record,
    broken_record,
    empty_folder_of_the_user,
    made_folder_in_it,
]


@pytest.mark.parametrize("change", FOREIGN)
def test_what_is_not_on_the_record_is_named_and_nothing_is_touched(tmp_path: Path, change) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f").write_text("mine")
    (elsewhere / "g").write_text("mine")
    path = made(tmp_path / "d")
    change(path)
    before = tree(elsewhere), sorted(os.listdir(tmp_path)), sorted(os.walk(path))
    with pytest.raises(ChatBindError, match="is on no record of what chatbind made"):
        made(path, "new")
    assert (tree(elsewhere), sorted(os.listdir(tmp_path)), sorted(os.walk(path))) == before


def test_names_that_lead_out_of_the_folder_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "empty").mkdir(parents=True)
    (outside / "thesis").write_text("mine")
    path = made(tmp_path / "d")
    (path / "link").symlink_to(outside)
    names = [
        "../outside/thesis",
        str(outside / "thesis"),
        "link/thesis",
        "../outside/",
        "/",
        "..//",
    ]
    names += ["../outside/empty/x", "link/empty/x", "link/", ".", "./", ""]
    note_made(path, names, made_by="toy")
    before = tree(outside)
    with pytest.raises(ChatBindError, match="link: is on no record"):
        refuse_foreign(path, made_by="toy")
    (path / "thesis").write_text("mine")
    remove_made(path)
    assert tree(outside) == before
    assert sorted(os.listdir(path)) == ["link", "thesis"]


def test_the_folder_of_another_command_is_left_alone(tmp_path: Path) -> None:
    path = made(tmp_path / "d")
    with pytest.raises(ChatBindError, match="was made by `chatbind toy`, so `chatbind convert`"):
        refuse_foreign(path, made_by="convert")


def test_a_hard_link_to_a_replaced_file_keeps_its_content(tmp_path: Path) -> None:
    path = made(tmp_path / "d")
    (tmp_path / "kept").hardlink_to(path / "f")
    made(path, "new")
    assert (tmp_path / "kept").read_text() == "old"


@pytest.mark.parametrize("name", [".lock", "writer.lock"])
def test_an_empty_folder_and_one_with_only_a_lock_are_free(tmp_path: Path, name: str) -> None:
    refuse_foreign(tmp_path, made_by="toy")
    (tmp_path / name).touch()
    refuse_foreign(tmp_path, made_by="toy")
    (tmp_path / name).write_text("not ours")
    with pytest.raises(ChatBindError, match=name):
        refuse_foreign(tmp_path, made_by="toy")


def test_what_a_kill_left_half_written_is_ours_by_its_name(tmp_path: Path) -> None:
    note_made(tmp_path, ["model.bin", "sub/x"], made_by="toy")
    for name in (".model.bin.abcd1234.tmp", f".{RECORD}.abcd1234.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".sub.abcd1234.tmp").mkdir()
    (tmp_path / ".sub.abcd1234.tmp" / "x").write_text("half")
    with (tmp_path / RECORD).open("a") as file:
        file.write('"half')
    note_made(tmp_path, ["later"], made_by="toy")
    (tmp_path / "later").write_text("whole")
    refuse_foreign(tmp_path, made_by="toy")
    remove_made(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / ".thesis.abcd1234.tmp").write_text("mine")
    with pytest.raises(ChatBindError, match="thesis"):
        refuse_foreign(tmp_path, made_by="toy")


@pytest.mark.parametrize("place", [".", "/"])
def test_the_working_folder_and_a_mount_point_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ChatBindError, match="the finished one takes its place; name a folder in it"),
        replace_folder(Path(place), made_by="toy", overwrite=True),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_the_next_run_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    real = {name: getattr(Path, name) for name in ("replace", "unlink", "rmdir")}

    class Killed(BaseException):
        pass

    for steps in range(12):
        path = made(tmp_path / str(steps) / "d")
        left = [steps]

        def dying(name: str, left: list[int] = left):
            def call(self: Path, *words: object, **more: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real[name](self, *words, **more)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, dying(name))
            patch.setattr("shutil.rmtree", lambda *a, **k: None)  # a kill tidies nothing up
            try:
                made(path, "new")
                break
            except Killed:
                pass
        if path.exists() or exchange:
            assert {(path / "f").read_text(), (path / "sub/g").read_text()} in ({"old"}, {"new"})
        made(path, "newest")
        assert (path / "f").read_text() == "newest"
        assert os.listdir(path.parent) == ["d"], steps
    else:
        raise AssertionError("it never came to its end")
    assert steps > 5


def test_a_living_maker_s_folder_is_not_taken_for_litter(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "d", made_by="toy") as temporary:
        (temporary / "f").write_text("slow")
        folders.clear_leftovers(tmp_path / "d")
        assert (temporary / "f").read_text() == "slow"


def test_a_full_disk_while_a_name_is_noted_stops_before_the_file(tmp_path: Path) -> None:
    script = (
        "import resource, sys, pathlib\n"
        "from chatbind_cli.folders import note_made\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    note_made(pathlib.Path(sys.argv[1]), ['x' * 200], made_by='toy')\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    note_made(tmp_path, ["a"], made_by="toy")
    (tmp_path / "a").write_text("ours")
    words = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(words, check=False).returncode == errno.EFBIG
    refuse_foreign(tmp_path, made_by="toy")
