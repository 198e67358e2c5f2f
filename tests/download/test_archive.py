import gzip
import io
import stat
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from chatbind_cli.download.archive import unpack
from chatbind_cli.errors import ChatBindError, DownloadError

FILES = {"a.txt": b"alpha", "sub/b.bin": bytes(100_000), "sub/deep/c": b""}


def make_zip(path, files, mode=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode is not None:
                info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def make_tar(path, files, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = link
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data))
    return path


def found(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_every_file_comes_out(tmp_path, make):
    archive = make(tmp_path / "x", FILES)
    assert len(unpack(archive, tmp_path / "out")) == 3
    assert found(tmp_path / "out") == FILES


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:evil", "sub/.."]
)
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_written(tmp_path, make, name):
    archive = make(tmp_path / "x", {"fine.txt": b"1", name: b"2"})
    with pytest.raises(DownloadError, match="would leave the folder"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    archive = make_tar(tmp_path / "x", {"door": b""}, kind, "/etc/passwd")
    with pytest.raises(DownloadError, match="link or device"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_in_a_zip_are_refused(tmp_path):
    archive = make_zip(tmp_path / "x", {"door": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    with pytest.raises(DownloadError, match="link or device"):
        unpack(archive, tmp_path / "out")


def test_a_link_that_lay_in_the_folder_before_leads_nowhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    archive = make_zip(tmp_path / "x", FILES)
    with pytest.raises(DownloadError, match="leads out of"):
        unpack(archive, tmp_path / "out")
    assert found(tmp_path / "elsewhere") == {}


def test_a_bomb_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"small")
    # The directory entry lies about the size: 2 GiB of it in a few bytes of archive.
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (2 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="not plausible"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_larger_than_the_archive_says_is_refused(tmp_path):
    path = make_zip(tmp_path / "x", {"f": bytes(5000)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack(path, tmp_path / "out")
    assert found(tmp_path / "out") == {}


def tar_header(kind, size, name="x"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_of_gigabytes_is_refused_unread(tmp_path, kind, packed, first):
    before = b"" if first else tar_header(tarfile.REGTYPE, 0)
    data = before + tar_header(kind, 3 << 30) + bytes(100_000)
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DownloadError, match="a header of 3221225472 bytes; do not trust it"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_members_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("chatbind_cli.download.archive._MOST_NAMES_BYTES", 50 * 103)
    entries = b"".join(tar_header(tarfile.DIRTYPE, 0, f"d{n}") for n in range(60))
    (tmp_path / "x").write_bytes(entries + bytes(1024))
    make_zip(tmp_path / "y", {f"f{n}": b"" for n in range(60)})
    for name in ("x", "y"):
        with pytest.raises(DownloadError, match="too many members"):
            unpack(tmp_path / name, tmp_path / "out")


def test_headers_that_unpack_to_gigabytes_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for n in range(5):
            info = tarfile.TarInfo(f"f{n}")
            info.pax_headers = {"comment": "x" * 100_000}
            archive.addfile(info)
    assert len(unpack(tmp_path / "x", tmp_path / "fine")) == 5
    monkeypatch.setattr("chatbind_cli.download.archive._ALWAYS_FINE_BYTES", 1000)
    with pytest.raises(DownloadError, match="not plausible"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_a_member_that_is_one_large_hole_is_refused(tmp_path):
    head = bytearray(tar_header(tarfile.GNUTYPE_SPARSE, 0))
    head[483:495] = b"%011o\0" % (4 << 30)
    head[148:156] = b"%06o\0 " % tarfile.calc_chksums(head)[0]
    (tmp_path / "x").write_bytes(head + bytes(1024))
    with pytest.raises(DownloadError, match="not plausible"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_headers_of_headers_of_headers_are_one_line(tmp_path):
    chain = (tar_header(tarfile.XGLTYPE, 512) + b"11 a=bcdef\n".ljust(512, b"\0")) * 3000
    (tmp_path / "x").write_bytes(gzip.compress(tar_header(tarfile.REGTYPE, 0) + chain))
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_names_that_no_disk_takes_are_refused(tmp_path):
    archive = make_tar(tmp_path / "x", {"a" * 5000: b""})
    with pytest.raises(DownloadError, match="whose name has 5000 characters"):
        unpack(archive, tmp_path / "out")


def test_a_zip_whose_directory_lies_is_refused(tmp_path):
    path = make_zip(tmp_path / "x", {"f": b"1"})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x05\x06") + 12
    data[at : at + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="archive"):
        unpack(path, tmp_path / "out")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("f", bytes(10_000_000))
    with pytest.raises(DownloadError, match="compressed by method 12"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_large_members_come_out_of_every_kind_of_tar(tmp_path, mode):
    data = bytes(range(256)) * 3_000
    with tarfile.open(tmp_path / "x", mode) as archive:
        for name in ("a", "folder/b", "c" * 200):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert len(unpack(tmp_path / "x", tmp_path / "out")) == 3
    assert set(found(tmp_path / "out").values()) == {data}


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "x", FILES)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ChatBindError, match="make room"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_broken_archive_is_one_line(tmp_path, make):
    archive = make(tmp_path / "x", {"f": bytes(range(256)) * 400})
    data = bytearray(archive.read_bytes())
    data[60:120] = bytes(60)
    archive.write_bytes(data)
    with pytest.raises(DownloadError, match="archive") as error:
        unpack(archive, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_tar_may_begin_with_the_folder_itself(tmp_path):
    (tmp_path / "x").write_bytes(
        tar_header(tarfile.DIRTYPE, 0, "./") + tar_header(tarfile.REGTYPE, 0, "./a") + bytes(1024)
    )
    unpack(tmp_path / "x", tmp_path / "out")
    assert found(tmp_path / "out") == {"a": b""}


def test_something_else_is_no_archive(tmp_path):
    (tmp_path / "x").write_bytes(b"hello" * 1000)
    with pytest.raises(DownloadError, match="neither a zip nor a tar"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_an_interrupted_unpacking_leaves_nothing_half_and_is_made_up_for(tmp_path):
    archive = make_zip(tmp_path / "x", FILES)

    def stop(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out", advance=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"x"}
    (tmp_path / ".x.unpacking").mkdir()  # as a kill leaves it
    (tmp_path / ".x.unpacking/half").write_bytes(b"1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.txt").write_bytes(FILES["a.txt"])
    before = (tmp_path / "out/a.txt").stat().st_mtime_ns
    assert len(unpack(archive, tmp_path / "out")) == 3
    assert found(tmp_path / "out") == FILES
    assert (tmp_path / "out/a.txt").stat().st_mtime_ns == before
    assert not (tmp_path / ".x.unpacking").exists()
