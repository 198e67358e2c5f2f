"""The embedding store: what it promises to readers, to writers, and to those who kill them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.data.database import FILE_NAME, JOURNAL_NAME
from chatbind_cli.data.store import EmbeddingStore, clear_store
from chatbind_cli.errors import ChatBindError, StoreError

DIM = 8
ENCODER = "e" * 64
FINGERPRINT = "image/v1"


def sha(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def name_of(number: int) -> str:
    return f"images/{number:09d}.jpg"


def vector(seed: int, dim: int = DIM) -> torch.Tensor:
    """Values that float16 holds exactly."""
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed)).half().float()


def writer(folder: Path, **options: Any) -> EmbeddingStore:
    settings = {"encoder_sha256": ENCODER, "encoder_name": "tiny", "dim": DIM, **options}
    return EmbeddingStore.open(folder, "a", **settings)


def fill(store: EmbeddingStore, numbers: range) -> None:
    for i in numbers:
        store.add(name_of(i), "image", sha(str(i)), FINGERPRINT, vector(i))


def filled(folder: Path, n: int, **options: Any) -> Path:
    with writer(folder, **options) as store:
        fill(store, range(n))
    return folder


def assert_holds(store: EmbeddingStore, numbers: range) -> None:
    assert len(store) == len(numbers)
    for i in numbers:
        found = store.get("image", name=name_of(i))
        assert found is not None
        assert torch.equal(found, vector(i))


def test_what_is_added_is_found_by_name_and_by_content(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(5))
        assert_holds(store, range(5))  # before it is committed
    store = EmbeddingStore.open(tmp_path / "s")
    assert_holds(store, range(5))
    found = store.recall("image", sha("3"), FINGERPRINT)
    assert found is not None
    assert torch.equal(found, vector(3))
    assert store.recall("image", sha("3"), "image/v2") is None
    assert store.recall("depth", sha("3"), FINGERPRINT) is None
    assert store.get("depth", name=name_of(3)) is None
    assert store.get("image", name="other.jpg") is None
    assert store.get("image", name=name_of(1), fingerprint="image/v2") is None
    assert store.kinds() == {("image", FINGERPRINT)}
    assert store.meta.encoder_sha256 == ENCODER
    assert (store.meta.dtype, store.meta.dim) == ("float16", DIM)


def test_a_store_is_read_with_any_sqlite(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        rows = file.execute("SELECT name, modality, embedding FROM embeddings").fetchall()
        said = dict(file.execute("SELECT key, value FROM store").fetchall())
    assert [row[:2] for row in rows] == [(name_of(i), "image") for i in range(3)]
    assert [row[2] for row in rows] == [vector(i).half().numpy().tobytes() for i in range(3)]
    assert json.loads(said["encoder_sha256"]) == ENCODER


def test_the_same_content_under_the_same_name_is_not_there_twice(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    filled(tmp_path, 3)
    assert_holds(EmbeddingStore.open(tmp_path), range(3))


def test_of_two_rows_of_a_name_the_newer_counts(tmp_path: Path) -> None:
    with writer(tmp_path) as store:
        fill(store, range(3))
        store.add(name_of(1), "image", sha("new"), FINGERPRINT, vector(98))
        store.add(name_of(1), "image", sha("new"), "image/v2", vector(99))
    for opened in (EmbeddingStore.open(tmp_path), EmbeddingStore.open(tmp_path, "a")):
        with opened:
            assert len(opened) == 4
            for made, number in ((None, 99), (FINGERPRINT, 98), ("image/v2", 99)):
                found = opened.get("image", name=name_of(1), fingerprint=made)
                assert found is not None
                assert torch.equal(found, vector(number))


def test_float32_keeps_every_bit_and_names_may_be_anything(tmp_path: Path) -> None:
    names = ["naïve 你好 😀.png", "a/b c.png", "", os.fsdecode(b"caf\xe9.png"), "\ud83d", "a\0b"]
    exact = [torch.randn(DIM, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with writer(tmp_path / "s", dtype="float32") as store:
        for name, row in zip(names, exact, strict=True):
            store.add(name, "depth", sha("x"), "depth/v1", row)
    store = EmbeddingStore.open(tmp_path / "s")
    for name, row in zip(names, exact, strict=True):
        found = store.get("depth", name=name)
        assert found is not None
        assert torch.equal(found, row)


def test_another_encoder_dim_or_dtype_is_refused(tmp_path: Path) -> None:
    writer(tmp_path / "s").close()
    with pytest.raises(StoreError, match="was made with encoder eee.*e, not fff"):
        EmbeddingStore.open(tmp_path / "s", encoder_sha256="f" * 64)
    with pytest.raises(StoreError, match="was made with dim 8, not 9"):
        writer(tmp_path / "s", dim=9)
    with pytest.raises(StoreError, match="was made with dtype float16, not float32"):
        writer(tmp_path / "s", dtype="float32")


def test_what_is_no_store_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no embedding store; make one"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(StoreError, match="cannot be made: .*encoder_sha256"):
        EmbeddingStore.open(tmp_path / "new", "a")
    with pytest.raises(StoreError, match="cannot be made: its dtype is 'float8'"):
        writer(tmp_path / "new", dtype="float8")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "store.json", FILE_NAME):
        (photos / name).write_bytes(b"")
        with pytest.raises(ChatBindError, match=r"(is on no record|cannot be used)"):
            writer(photos)
    assert {path.name for path in photos.iterdir()} == {"a.jpg", "store.json", FILE_NAME}


def test_only_fitting_embeddings_are_added(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        with pytest.raises(StoreError, match=r"a\.jpg: has an embedding of \[9\]; the store's are"):
            store.add("a.jpg", "image", sha("a"), FINGERPRINT, torch.ones(9))
        for value in (float("nan"), 1e6):  # float16 ends at 65504
            with pytest.raises(StoreError, match="not finite in float16"):
                store.add("a.jpg", "image", sha("a"), FINGERPRINT, torch.full((DIM,), value))
        assert len(store) == 0
    with pytest.raises(StoreError, match="open for reading only"):
        EmbeddingStore.open(tmp_path / "s").add("a", "image", sha("a"), "f", vector(0))


def test_two_writers_at_once_are_refused_and_readers_are_not(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    with writer(tmp_path) as store:
        fill(store, range(2, 4))
        with pytest.raises(ChatBindError, match="another process is writing it"):
            writer(tmp_path)
        reader = EmbeddingStore.open(tmp_path)
        assert_holds(reader, range(2))
    assert_holds(reader, range(4))
    writer(tmp_path).close()


def test_a_writer_keeps_readers_out_only_while_it_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbind_cli.data.database._PATIENCE_S", 0)
    monkeypatch.setattr("chatbind_cli.data.store._SECONDS_PER_COMMIT", 60)
    with writer(tmp_path, dim=1024) as store:
        for i in range(2000):  # more than SQLite's cache holds
            store.add(name_of(i), "image", sha(str(i)), FINGERPRINT, torch.ones(1024))
        assert len(EmbeddingStore.open(tmp_path)) == 0


def test_a_full_disk_is_not_taken_for_another_process(tmp_path: Path) -> None:
    full = pytest.raises(StoreError, match="is full; make room and run the same command again")
    with full, writer(tmp_path / "s") as store:
        store._run("PRAGMA max_page_count=9")
        fill(store, range(1000))


def test_rows_are_committed_while_others_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbind_cli.data.store._SECONDS_PER_COMMIT", 0)
    with writer(tmp_path) as store:
        fill(store, range(3))
        assert_holds(EmbeddingStore.open(tmp_path), range(3))


def test_processes_of_a_data_loader_read_the_same(tmp_path: Path) -> None:
    """They are forked with the store open, or get it pickled."""
    reader = EmbeddingStore.open(filled(tmp_path, 10))
    assert_holds(pickle.loads(pickle.dumps(reader)), range(10))
    workers = [
        multiprocessing.get_context("fork").Process(target=assert_holds, args=(reader, range(10)))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert_holds(reader, range(10))


def killed_while_writing(folder: Path) -> Path:
    """What a killed writer leaves: a journal, and half of its last commit in the file."""
    filled(folder, 600)
    copy = folder.parent / "copy"
    copy.mkdir()
    with writer(folder) as store:
        # as if the kill had come while a commit was written
        store._connection.execute("PRAGMA cache_spill = 1")
        store._connection.execute("PRAGMA cache_size = 1")
        fill(store, range(300, 1200))
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    assert (copy / JOURNAL_NAME).stat().st_size > 0
    return copy


def test_what_a_kill_left_half_written_is_undone_by_whoever_comes_next(tmp_path: Path) -> None:
    copy = killed_while_writing(tmp_path / "s")
    assert_holds(EmbeddingStore.open(copy), range(600))
    with writer(copy) as store:
        fill(store, range(600, 700))
    assert_holds(EmbeddingStore.open(copy), range(700))
    assert not (copy / JOURNAL_NAME).exists()


def test_a_journal_that_names_another_file_is_not_played_back(tmp_path: Path) -> None:
    folder = killed_while_writing(tmp_path / "s")
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    name = os.fsencode(thesis)
    with (folder / JOURNAL_NAME).open("ab") as file:
        tail = [len(name).to_bytes(4, "big"), (sum(name) & 0xFFFFFFFF).to_bytes(4, "big")]
        file.write(b"".join([b"\0\0\0\1", name, *tail, bytes.fromhex("d9d505f920a163d7")]))
    for mode in ("r", "a"):
        with pytest.raises(StoreError, match="is no journal of ours; remove it"):
            EmbeddingStore.open(folder, mode)  # type: ignore[arg-type]
    assert thesis.read_text() == "mine"


def test_a_file_system_without_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    tried = []

    def without_locks(address: Any, **options: Any) -> sqlite3.Connection:
        tried.append(str(address).rpartition("?")[2])
        if options.get("uri") and "nolock=1" not in address:
            raise sqlite3.OperationalError("disk I/O error")
        return connect(address, **options)

    monkeypatch.setattr("chatbind_cli.data.database.sqlite3.connect", without_locks)
    filled(tmp_path, 3)
    assert "mode=rw&nolock=1" in tried
    assert_holds(EmbeddingStore.open(tmp_path), range(3))
    assert tried[-1] == "mode=ro&nolock=1"


def rows_of(statement: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path)) as file, file:
            file.executescript(statement)

    return damage


def bytes_of(start: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data)

    return damage


HOSTILE = {
    "no database": lambda path: path.write_bytes(b"SQLite format 3?" * 999),
    "an empty file": lambda path: path.write_bytes(b""),
    "cut off": lambda path: os.truncate(path, 40_000),
    "broken header": bytes_of(16, b"\0\1\2\3"),
    "broken schema page": bytes_of(100, b"\xff" * 400),
    "other tables": rows_of("DROP TABLE store; CREATE TABLE store (k, v)"),
    "a view": rows_of("CREATE VIEW v AS SELECT 1"),
    "a trigger": rows_of("CREATE TRIGGER t AFTER INSERT ON store BEGIN DELETE FROM store; END"),
    "nothing said": rows_of("DELETE FROM store"),
    "no JSON": rows_of("UPDATE store SET value = 'x'"),
    "deep JSON": rows_of(f"UPDATE store SET value = '{'[' * 50_000}'"),
    "no text": rows_of("UPDATE store SET value = x'ff'"),
    "dim of text": rows_of("UPDATE store SET value = '\"8\"' WHERE key = 'dim'"),
    "vast dim": rows_of("UPDATE store SET value = 1e99 WHERE key = 'dim'"),
    "odd dtype": rows_of("UPDATE store SET value = '[]' WHERE key = 'dtype'"),
    "lying dim": rows_of("UPDATE store SET value = '9' WHERE key = 'dim'"),
    "lying dtype": rows_of("UPDATE store SET value = '\"float32\"' WHERE key = 'dtype'"),
    "short blobs": rows_of("UPDATE embeddings SET embedding = x'00'"),
    "text in place of blobs": rows_of("UPDATE embeddings SET embedding = '0123456789abcdef'"),
    "vast blobs": rows_of("UPDATE embeddings SET embedding = zeroblob(70000000) WHERE id = 1"),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_an_error_of_one_line(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(filled(tmp_path, 100) / FILE_NAME)
    with pytest.raises(StoreError, match=FILE_NAME) as caught:
        for number in range(100):
            EmbeddingStore.open(tmp_path).get("image", name=name_of(number))
    assert "\n" not in str(caught.value)


def test_whatever_byte_is_wrong_it_is_an_error_or_a_number(tmp_path: Path) -> None:
    whole = (filled(tmp_path, 100) / FILE_NAME).read_bytes()
    chance = random.Random(1)
    failed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 30))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / FILE_NAME).write_bytes(data)
        try:
            with EmbeddingStore.open(tmp_path) as store:
                for number in range(0, 100, 9):
                    store.get("image", name=name_of(number))
                len(store)
                store.kinds()
        except StoreError:
            failed += 1
    assert failed


def test_a_store_with_somebody_s_file_in_it_is_not_cleared(tmp_path: Path) -> None:
    filled(tmp_path / "s", 6)
    for name in ("thesis.txt", ".thesis.tmp"):
        (tmp_path / "s" / name).write_text("mine")
        with pytest.raises(ChatBindError, match=f"{name}: is on no record"):
            clear_store(tmp_path / "s")
        filled(tmp_path / "s", 7)
        assert (tmp_path / "s" / name).read_text() == "mine"
        (tmp_path / "s" / name).unlink()


def test_a_cleared_store_can_be_made_anew(tmp_path: Path) -> None:
    filled(tmp_path / "s", 6)
    clear_store(tmp_path / "s")
    clear_store(tmp_path / "s")
    with writer(tmp_path / "s", dim=3) as store:
        assert len(store) == 0
    os.truncate(tmp_path / "s" / FILE_NAME, 5000)  # a broken one, too
    clear_store(tmp_path / "s")
    writer(tmp_path / "s").close()


def test_a_half_made_file_is_removed(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (tmp_path / f".{FILE_NAME}.abcd1234.tmp").write_bytes(b"half")
    filled(tmp_path, 2)
    assert not list(tmp_path.glob(".*.tmp"))


KILLED = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from chatbind_cli.data import store
    from test_store import fill, writer
    store._SECONDS_PER_COMMIT = 0.004
    with writer(Path(sys.argv[1])) as opened:
        print("ready", flush=True)
        fill(opened, range(len(opened), 20_000))
    """
)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_no_more_than_a_commit(tmp_path: Path) -> None:
    script = tmp_path / "write.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    chance = random.Random(3)
    rows = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / "s"],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.05, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        with EmbeddingStore.open(tmp_path / "s") as store:
            assert len(store) > rows
            rows = len(store)
            assert_holds(store, range(rows))
    filled(tmp_path / "s", rows + 10)
    assert_holds(EmbeddingStore.open(tmp_path / "s"), range(rows + 10))


def test_cc3m_595k_fits_in_its_budget(tmp_path: Path) -> None:
    n, total = 10_000, 595_375
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    with writer(tmp_path, dim=1024) as store:
        for i in random.Random(0).sample(range(n), n):
            name = f"GCC_train_{i * 5:09d}.jpg"
            store.add(name, "image", sha(name), FINGERPRINT, values)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size * total / n < 1.45e9
