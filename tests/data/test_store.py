"""The embedding store: what it promises to readers, to writers, and to those who kill them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.data.store import EmbeddingStore, clear_store
from chatbind_cli.errors import ChatBindError, StoreError

DIM = 8
ENCODER = "e" * 64
FINGERPRINT = "image/v1"


def sha(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def vector(seed: int, dim: int = DIM) -> torch.Tensor:
    """Values that float16 holds exactly."""
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed)).half().float()


def writer(folder: Path, **options: object) -> EmbeddingStore:
    settings = {"encoder_sha256": ENCODER, "encoder_name": "tiny", "dim": DIM, **options}
    return EmbeddingStore.open(folder, "a", **settings)  # type: ignore[arg-type]


def fill(store: EmbeddingStore, numbers: range) -> None:
    for i in numbers:
        store.add(f"images/{i:09d}.jpg", "image", sha(str(i)), FINGERPRINT, vector(i))


def assert_holds(store: EmbeddingStore, numbers: range) -> None:
    assert len(store) == len(numbers)
    assert [entry.name for entry in store.entries()] == [f"images/{i:09d}.jpg" for i in numbers]
    for i in numbers:
        found = store.get("image", name=f"images/{i:09d}.jpg")
        assert found is not None
        assert torch.equal(found, vector(i))


def test_what_is_added_is_found_by_name_and_by_content(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(5))
        assert_holds(store, range(5))  # before it is sealed
    store = EmbeddingStore.open(tmp_path / "s")
    assert_holds(store, range(5))
    found = store.get("image", content_sha256=sha("3"), fingerprint=FINGERPRINT)
    assert found is not None
    assert torch.equal(found, vector(3))
    assert ("image", "images/000000003.jpg") in store
    assert ("depth", "images/000000003.jpg") not in store
    assert store.get("image", content_sha256=sha("3"), fingerprint="image/v2") is None
    assert store.get("image", name="other.jpg") is None
    assert store.has("images/000000001.jpg", "image", FINGERPRINT)
    assert not store.has("images/000000001.jpg", "image", "image/v2")
    with pytest.raises(ValueError, match="name or a content hash"):
        store.get("image")


def test_shards_are_plain_safetensors_in_the_order_of_adding(tmp_path: Path) -> None:
    with writer(tmp_path / "s", rows_per_shard=4) as store:
        fill(store, range(10))
    shards = sorted((tmp_path / "s").glob("*.safetensors"))
    rows = [load_file(path)["embeddings"] for path in shards]
    assert [len(part) for part in rows] == [4, 4, 2]
    assert torch.equal(torch.cat(rows), torch.stack([vector(i) for i in range(10)]).half())
    assert not (tmp_path / "s" / "journal.bin").exists()
    meta = json.loads((tmp_path / "s" / "store.json").read_text())
    assert meta["encoder_sha256"] == ENCODER
    assert (meta["dtype"], meta["dim"], meta["normalized"]) == ("float16", DIM, False)


def test_later_runs_fill_the_last_shard_up_and_leave_the_full_ones_alone(tmp_path: Path) -> None:
    with writer(tmp_path / "s", rows_per_shard=4) as store:
        fill(store, range(6))
    first = tmp_path / "s" / "shard-00000.safetensors"
    before = first.stat()
    for i in range(6, 11):
        with writer(tmp_path / "s", rows_per_shard=4) as store:
            fill(store, range(i, i + 1))
    assert first.stat() == before
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 3
    assert_holds(EmbeddingStore.open(tmp_path / "s"), range(11))


def test_the_same_content_under_the_same_name_is_not_added_twice(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(3))
        fill(store, range(3))
    with writer(tmp_path / "s") as store:
        fill(store, range(3))
        assert_holds(store, range(3))


def test_of_two_rows_of_a_name_the_newer_counts(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(3))
        store.add("images/000000001.jpg", "image", sha("new"), FINGERPRINT, vector(99))
        for opened in (store, None):
            found = (opened or store).get("image", name="images/000000001.jpg")
            assert found is not None
            assert torch.equal(found, vector(99))
    found = EmbeddingStore.open(tmp_path / "s").get("image", name="images/000000001.jpg")
    assert found is not None
    assert torch.equal(found, vector(99))


def test_float32_keeps_every_bit_and_names_may_be_anything(tmp_path: Path) -> None:
    names = ["naïve 你好 😀.png", "a/b c.png", "", os.fsdecode(b"caf\xe9.png")]
    exact = torch.randn(DIM, generator=torch.Generator().manual_seed(7))
    with writer(tmp_path / "s", dtype="float32") as store:
        for name in names:
            store.add(name, "depth", sha(name), "depth/v1", exact)
    store = EmbeddingStore.open(tmp_path / "s")
    assert [entry.name for entry in store.entries()] == names
    for name in names:
        found = store.get("depth", name=name)
        assert found is not None
        assert torch.equal(found, exact)


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
    with pytest.raises(StoreError, match="a new one needs an encoder"):
        EmbeddingStore.open(tmp_path / "new", "a")
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "store.json"):
        (tmp_path / "photos" / name).write_bytes(b"")
        with pytest.raises(ChatBindError, match=rf"{name}: (is on no record|cannot be read)"):
            writer(tmp_path / "photos")
    assert {path.name for path in (tmp_path / "photos").iterdir()} == {"a.jpg", "store.json"}
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(StoreError, match=r"store\.json: cannot be read"):
        EmbeddingStore.open(tmp_path)


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
    with writer(tmp_path / "s") as store:
        fill(store, range(2))
        with pytest.raises(StoreError, match="another process is writing to this store"):
            writer(tmp_path / "s")
        assert_holds(EmbeddingStore.open(tmp_path / "s"), range(2))
    writer(tmp_path / "s").close()


def test_a_reader_keeps_seeing_the_store_that_it_opened(tmp_path: Path) -> None:
    with writer(tmp_path / "s", rows_per_shard=4) as store:
        fill(store, range(6))
        reader = EmbeddingStore.open(tmp_path / "s")
        fill(store, range(6, 20))
    assert_holds(reader, range(6))
    assert_holds(pickle.loads(pickle.dumps(reader)), range(20))  # what a loader's worker does


def _read_in_worker(store: EmbeddingStore, number: int) -> list[float]:
    found = store.get("image", name=f"images/{number:09d}.jpg")
    return [] if found is None else found.tolist()


def test_processes_that_are_spawned_read_the_same(tmp_path: Path) -> None:
    with writer(tmp_path / "s", rows_per_shard=4) as store:
        fill(store, range(10))
    reader = EmbeddingStore.open(tmp_path / "s")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.starmap(_read_in_worker, [(reader, 2), (reader, 9), (reader, 10)])
    assert found == [vector(2).tolist(), vector(9).tolist(), []]


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_journal_cut_off_anywhere_loses_only_what_was_cut(tmp_path: Path) -> None:
    store = writer(tmp_path / "s", rows_per_shard=4)
    fill(store, range(7))  # one full shard, three rows in the journal
    whole = (tmp_path / "s" / "journal.bin").read_bytes()
    head = 16
    row = (len(whole) - head) // 3
    for size in {*range(0, len(whole), 7), head, head + row, len(whole) - 1, len(whole)}:
        folder = tmp_path / "cut"
        copy = copy_of(tmp_path / "s", folder)
        (copy / "journal.bin").write_bytes(whole[:size])
        kept = 4 + max(0, size - head) // row
        assert_holds(EmbeddingStore.open(copy), range(kept))
        with writer(copy, rows_per_shard=4) as resumed:
            fill(resumed, range(9))
        assert_holds(EmbeddingStore.open(copy), range(9))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    store.close()


def test_a_damaged_row_of_the_journal_is_encoded_again(tmp_path: Path) -> None:
    store = writer(tmp_path / "s")
    fill(store, range(3))
    copy = copy_of(tmp_path / "s", tmp_path / "copy")
    store.close()
    raw = bytearray((copy / "journal.bin").read_bytes())
    raw[-3] ^= 1
    (copy / "journal.bin").write_bytes(raw)
    assert_holds(EmbeddingStore.open(copy), range(2))
    with writer(copy) as resumed:
        fill(resumed, range(3))
    assert_holds(EmbeddingStore.open(copy), range(3))


def test_a_kill_between_writing_a_shard_and_deleting_its_journal_doubles_nothing(
    tmp_path: Path,
) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(2))
    store = writer(tmp_path / "s")
    fill(store, range(5))
    journal = (tmp_path / "s" / "journal.bin").read_bytes()
    store.close()
    (tmp_path / "s" / "journal.bin").write_bytes(journal)
    (tmp_path / "s" / ".shard-00000.safetensors.abcd1234.tmp").write_bytes(b"half")
    assert_holds(EmbeddingStore.open(tmp_path / "s"), range(5))
    with writer(tmp_path / "s") as store:
        fill(store, range(6))
    assert_holds(EmbeddingStore.open(tmp_path / "s"), range(6))
    assert not list((tmp_path / "s").glob(".*.tmp"))


def test_a_broken_or_missing_shard_is_named(tmp_path: Path) -> None:
    with writer(tmp_path / "s", rows_per_shard=2) as store:
        fill(store, range(6))
    shard = tmp_path / "s" / "shard-00001.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors: this shard is broken"):
        EmbeddingStore.open(tmp_path / "s")
    shard.unlink()
    with pytest.raises(StoreError, match="lacks a shard in the middle"):
        EmbeddingStore.open(tmp_path / "s")


def test_a_store_with_somebody_s_file_in_it_is_not_cleared(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(6))
    for name in ("thesis.txt", ".thesis.tmp"):
        (tmp_path / "s" / name).write_text("mine")
        with pytest.raises(ChatBindError, match=f"{name}: is on no record"):
            clear_store(tmp_path / "s")
        with writer(tmp_path / "s") as store:
            fill(store, range(7))
        assert (tmp_path / "s" / name).read_text() == "mine"
        (tmp_path / "s" / name).unlink()


def test_a_cleared_store_can_be_made_anew(tmp_path: Path) -> None:
    with writer(tmp_path / "s") as store:
        fill(store, range(6))
    clear_store(tmp_path / "s")
    clear_store(tmp_path / "s")
    with writer(tmp_path / "s", dim=3) as store:
        assert len(store) == 0


KILLED = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from test_store import fill, writer
    with writer(Path(sys.argv[1]), rows_per_shard=16) as store:
        print("ready", flush=True)
        fill(store, range(400))
    """
)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    script = tmp_path / "write.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    chance = random.Random(3)
    rows = 0
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / "s"],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.01, 0.12))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        with EmbeddingStore.open(tmp_path / "s") as store:
            assert len(store) >= rows
            rows = len(store)
            assert_holds(store, range(rows))
    assert killed
    with writer(tmp_path / "s", rows_per_shard=16) as store:
        fill(store, range(400))
    assert_holds(EmbeddingStore.open(tmp_path / "s"), range(400))
    undisturbed = tmp_path / "undisturbed"
    with writer(undisturbed, rows_per_shard=16) as store:
        fill(store, range(400))
    for path in sorted(undisturbed.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


def test_cc3m_595k_fits_in_its_budget(tmp_path: Path) -> None:
    n, total = 2 * 8192, 595_375
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    with EmbeddingStore.open(
        tmp_path / "s", "a", encoder_sha256=ENCODER, encoder_name="imagebind_huge", dim=1024
    ) as store:
        for i in range(n):
            name = f"GCC_train_{i * 5:09d}.jpg"
            store.add(name, "image", sha(name), FINGERPRINT, values)
    size = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert size * total / n < 1.3e9
    assert size / n < 2048 + 46 + len("GCC_train_000000000.jpg") + 1  # vector, columns, name


def test_a_shard_whose_kinds_make_no_sense_is_broken(tmp_path: Path) -> None:
    with writer(tmp_path) as store:
        fill(store, range(3))
    [path] = tmp_path.glob("shard-*")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'[[\\"image\\"', b'[[[\\"mage\\"', 1))
    assert path.read_bytes() != data
    with pytest.raises(StoreError, match="shard is broken"):
        EmbeddingStore.open(tmp_path)
