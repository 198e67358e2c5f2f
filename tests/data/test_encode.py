"""`chatbind encode` as a user meets it: records, stores, labels, errors, resuming."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chatbind_cli import cli
from chatbind_cli.data.lookup import open_stores
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.encoders.imagebind.weights import save_encoder
from chatbind_cli.encoders.opening import open_encoder
from tests.inference.world import SIZES
from tests.program import chatbind

TINY = ImageBindConfig(**SIZES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    modalities = ["image", "text", "audio", "depth", "thermal"]
    save_encoder(ImageBind(TINY, modalities), TINY, folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    noise = np.random.default_rng(0)
    for i in range(4):
        pixels = noise.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    depth = noise.integers(500, 4000, (32, 32), dtype=np.uint16)
    Image.fromarray(depth).save(folder / "depth.png")
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(noise.integers(-9000, 9000, 32000, dtype=np.int16).tobytes())
    return folder


@pytest.fixture
def run(media: Path, encoder: Path) -> Any:
    """Runs `chatbind encode` in the folder of media; returns exit code, records, and stderr."""

    def run(*args: str | Path, stdin: str = "") -> tuple[int, list[dict[str, Any]], str]:
        words = ("encode", "--device", "cpu", "--encoder", encoder, *args)
        done = chatbind(*words, cwd=media, stdin=stdin)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        return done.returncode, records, done.stderr.rstrip()

    return run


def test_files_become_records_in_their_order(run: Any, encoder: Path, media: Path) -> None:
    code, records, _ = run("3.png", "tone.wav", "depth.png", "0.png")
    assert code == 0
    found = [(record["path"], record["modality"]) for record in records]
    assert found == [
        ("3.png", "image"),
        ("tone.wav", "audio"),
        ("depth.png", "depth"),
        ("0.png", "image"),
    ]
    loaded = open_encoder(encoder)
    for record in records:
        expected = loaded.embed([load_media(media / record["path"])], normalize=True)[0]
        assert torch.equal(torch.tensor(record["embedding"]), expected)  # float32 survives JSON
        assert record["normalized"] is True
        assert record["encoder"] == f"tiny@{loaded.sha256[:12]}"


def test_embeddings_as_published_keep_their_scale(run: Any) -> None:
    _, records, _ = run("tone.wav", "depth.png", "--no-normalize", "--audio-clips", "1")
    norms = [float(torch.tensor(record["embedding"]).norm()) for record in records]
    assert norms == pytest.approx([20, 5], rel=1e-5)


def test_a_list_on_stdin_gives_the_same_as_words_on_the_line(run: Any) -> None:
    _, by_words, _ = run("0.png", "1.png", "tone.wav")
    code, by_lines, _ = run(stdin="0.png\n1.png\ntone.wav\n")
    assert (code, by_lines) == (0, by_words)
    _, by_dash, _ = run("-", "--num-workers", "0", stdin="0.png\n1.png\ntone.wav\n")
    assert by_dash == by_words


def test_records_on_stdin_keep_their_keys(run: Any, media: Path) -> None:
    questions = '{"question_id": 3, "image": "1.png", "text": "What?"}\n{"path": "depth.png"}\n'
    code, records, _ = run("--media-root", media, "--modality", "depth", stdin=questions)
    assert code == 0, records
    assert [(r["path"], r["modality"]) for r in records] == [
        ("1.png", "image"),
        ("depth.png", "depth"),
    ]
    assert records[0]["question_id"] == 3
    assert records[0]["text"] == "What?"


def test_what_cannot_be_read_is_a_record_with_an_error_and_exit_code_3(
    run: Any, media: Path
) -> None:
    (media / "broken.png").write_bytes((media / "0.png").read_bytes()[:200])
    code, records, message = run("0.png", "nothing.png", "broken.png", "1.png")
    (media / "broken.png").unlink()
    assert code == 3
    assert [r["path"] for r in records] == ["0.png", "nothing.png", "broken.png", "1.png"]
    assert ["embedding" in r for r in records] == [True, False, False, True]
    assert records[1]["error"] == "nothing.png: no such file"
    assert "2 of 4 files could not be encoded" in message
    assert "Traceback" not in message


def write_float_wav(path: Path, samples: np.ndarray[Any, Any], bits: int, code: int) -> None:
    """A WAV of a kind that the standard library does not write: float, or 64 bits."""
    data = samples.tobytes()
    head = struct.pack("<IHHIIHH", 16, code, 1, 16000, 2000 * bits, bits // 8, bits)
    riff = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + head
    path.write_bytes(riff + b"data" + struct.pack("<I", len(data)) + data)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sounds_that_break_decoder_or_encoder_take_no_other_along(
    run: Any, tmp_path: Path, workers: str
) -> None:
    tone = np.sin(np.arange(32000) / 9)
    write_float_wav(tmp_path / "64.wav", (tone * 2**62).astype("<i8"), 64, 1)
    tone[9000] = np.nan
    write_float_wav(tmp_path / "nan.wav", tone.astype("<f4"), 32, 3)
    files = ["0.png", tmp_path / "64.wav", tmp_path / "nan.wav", "tone.wav"]
    code, records, message = run(*files, "--num-workers", workers)
    assert code == 3, message
    assert ["embedding" in record for record in records] == [True, False, False, True]
    assert "2 of 4 files could not be encoded" in message
    code, records, message = run(*files, "--store", tmp_path / "store")
    assert code == 3, message
    assert [Path(record["path"]).name for record in records] == ["64.wav", "nan.wav", "store"]
    assert records[-1]["rows"] == 2


def test_bad_lines_of_a_list_are_records_and_a_second_run_makes_them_anew(
    run: Any, media: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.jsonl"
    listed.write_text(
        '{"path": "0.png", "encoder": "other", "normalized": 0, "embedding": 1, "error": "old"}\n'
        '{"path": "gone.png", "encoder": "other", "normalized": 0}\n'
        'no record\n{"path": "1.png", "weight": NaN}\n{"id": 5}\n'
    )
    words = ("--inputs", listed, "--media-root", media, "-o", tmp_path / "out.jsonl")
    code, _, message = run(*words)
    assert code == 3, message
    first = (tmp_path / "out.jsonl").read_text()
    records = [json.loads(line) for line in first.splitlines()]
    assert [(r.get("path"), r.get("line"), "error" in r) for r in records] == [
        ("0.png", None, False),
        ("gone.png", None, True),
        (None, 3, True),
        ("1.png", 4, True),
        (None, 5, True),
    ]
    assert records[0]["encoder"].startswith("tiny@")
    code, _, message = run(*words)
    assert code == 3, message
    assert (tmp_path / "out.jsonl").read_text() == first


def test_a_file_name_that_is_not_utf_8_is_known_again(
    run: Any, media: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")
    shutil.copy(media / "0.png", name)
    for there in (0, 1):
        code, _, message = run(name, "-o", tmp_path / "out.jsonl")
        assert code == 0, message
        assert (f"{there} were there already" in message) == bool(there)
    (line,) = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert json.loads(line.decode("utf-8"))["path"] == f"{tmp_path}/\\xe9.png"


def test_an_output_that_fails_ends_the_run_at_once(encoder: Path, many: Path) -> None:
    words = ["--encoder", encoder, *sorted(many.iterdir()), "--num-workers", "3"]
    done = subprocess.run(
        console(*words, "-o", "/dev/full"), capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "chatbind: error: /dev/full: cannot be written (No space left on device)\n"
    )


def test_errors_can_be_left_out_or_end_the_run(run: Any) -> None:
    code, records, message = run("nothing.png", "0.png", "--on-error", "skip")
    assert (code, [r["path"] for r in records]) == (0, ["0.png"])
    assert "left out: nothing.png: no such file" in message
    code, records, message = run("nothing.png", "0.png", "--on-error", "fail")
    assert (code, records) == (1, [])
    assert message.endswith("chatbind: error: nothing.png: no such file")


def test_a_modality_without_a_tower_is_an_error_record(run: Any, media: Path) -> None:
    np.save(media / "motion.npy", np.zeros((6, 500), np.float32))
    code, records, _ = run("motion.npy", "--imu-rate-hz", "100")
    (media / "motion.npy").unlink()
    assert code == 3
    assert "has no tower for imu" in records[0]["error"]


def test_a_run_cut_off_anywhere_is_continued_to_the_same_bytes(run: Any, tmp_path: Path) -> None:
    words = ["0.png", "1.png", "nothing.png", "tone.wav", "2.png"]
    output = tmp_path / "out.jsonl"
    assert run(*words, "-o", output)[0] == 3
    whole = output.read_bytes()
    failed_last = sorted(whole.splitlines(keepends=True), key=lambda line: b"error" in line)
    size = len(whole)
    for cut in (0, 1, size // 5, size // 2, whole.index(b"\n") + 1, size - 1, size):
        output.write_bytes(whole[:cut])
        assert run(*words, "-o", output)[0] == 3
        lines = output.read_bytes().splitlines(keepends=True)
        # a failed record is tried again, so it moves to the end
        assert sorted(lines) == sorted(whole.splitlines(keepends=True))
    assert run(*words, "-o", output)[0] == 3
    assert output.read_bytes() == b"".join(failed_last)
    assert run(*words[:2], "-o", output)[2].count("0 files encoded, 2 were there already") == 1


def test_a_file_of_other_embeddings_is_not_continued(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run("0.png", "-o", output)
    code, _, message = run("1.png", "-o", output, "--no-normalize")
    assert code == 1
    assert "out.jsonl:1: has normalized True, but this run has False" in message
    assert run("1.png", "-o", output, "--no-normalize", "--overwrite")[0] == 0
    assert output.read_text().count("\n") == 1


def training_file(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": i, "image": f"{i % 4}.png", "conversations": turns} for i in range(8)]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder / "chat.json"


def test_a_store_holds_what_a_training_file_names(
    run: Any, media: Path, tmp_path: Path, encoder: Path
) -> None:
    data = training_file(tmp_path)
    folder = tmp_path / "store"
    words = ["--data", data, "--media-root", media, "--store", folder]
    code, (artifact,), _ = run(*words)
    assert code == 0
    assert artifact["artifact"] == "store"
    assert artifact["path"] == str(folder.resolve())
    assert artifact["rows"] == 4
    loaded = open_encoder(encoder)
    store = EmbeddingStore.open(folder, encoder_sha256=loaded.sha256, dim=8)
    for i in range(4):
        expected = loaded.embed([load_media(media / f"{i}.png")], normalize=False)[0]
        found = store.get("image", name=f"{i}.png")
        assert found is not None
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)  # float16 at norm 1
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    assert "0 files encoded, 4 were there already" in run(*words)[2]
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    assert run(*words, "--overwrite")[1][0]["rows"] == 4
    # other preprocessing of the same names is another embedding
    run(media / "tone.wav", "--media-root", media, "--store", folder)
    _, (artifact,), _ = run(
        media / "tone.wav", "--media-root", media, "--store", folder, "--audio-clips", "2"
    )
    assert artifact["rows"] == 6
    assert EmbeddingStore.open(folder).get("audio", name="tone.wav") is not None


def test_shards_fill_one_store_together(run: Any, tmp_path: Path) -> None:
    files = [f"{i}.png" for i in range(4)] + ["tone.wav"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert run(*files, "--store", whole)[0] == 0
    rows = []
    for number in (1, 2, 3):
        code, records, _ = run(*files, "--store", shared, "--shard", f"{number}/3")
        assert code == 0
        rows.append(records[-1]["rows"])
    assert rows == [2, 2, 1]
    stores, single = open_stores(shared), EmbeddingStore.open(whole)
    for file in files:
        modality = "audio" if file.endswith("wav") else "image"
        found = [row for s in stores if (row := s.get(modality, name=file)) is not None]
        assert len(found) == 1
        assert torch.equal(found[0], single.get(modality, name=file))
    code, records, _ = run(*files, "--shard", "3/3", "--no-normalize")
    assert [record["path"] for record in records] == ["2.png"]


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/", "-1/3", "1/3/5"])
def test_a_shard_that_is_none_is_refused(run: Any, shard: str) -> None:
    code, _, said = run("0.png", f"--shard={shard}")
    assert code == 2 and "3/16" in said


def test_decoding_in_processes_changes_no_record(run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    files = ["0.png", "tone.wav", tmp_path / "broken.png", "1.png"]
    code, records, _ = run(*files, "--decode-in", "processes", "--num-workers", "1")
    assert code == 3
    assert records == run(*files, "--decode-in", "threads")[1]


def test_labels_get_probabilities(
    run: Any, encoder: Path, tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def tokenize(texts: list[str], context: int) -> torch.Tensor:
        prompts.extend(texts)
        ids = torch.zeros(len(texts), 77, dtype=torch.long)
        for row, words in zip(ids, texts, strict=True):
            row[:3] = torch.tensor([49406, len(words) * 100, 49407])
        return ids

    monkeypatch.setattr("chatbind_cli.encoders.imagebind.encoder.tokenize", tokenize)
    labels = tmp_path / "labels.txt"
    labels.write_text("dog\n\ncar wash\n  a very long label \n")
    code, records, _ = run("0.png", "tone.wav", "--zero-shot", labels)
    assert code == 0
    assert prompts == ["a dog", "a car wash", "a a very long label"]
    loaded = open_encoder(encoder)
    for record in records:
        rows = loaded.embed([load_media(media / record["path"])], normalize=True)
        logits = rows @ loaded.embed_texts(prompts[:3]).T
        likely = logits.softmax(dim=-1)[0].tolist()
        expected = dict(zip(["dog", "car wash", "a very long label"], likely, strict=True))
        got = {entry["label"]: entry["probability"] for entry in record["labels"]}
        assert got == pytest.approx(expected, rel=1e-4)
        assert sum(got.values()) == pytest.approx(1)
        assert list(got.values()) == sorted(got.values(), reverse=True)
        assert "embedding" not in record
    _, records, _ = run(
        "0.png", "--zero-shot", labels, "--top-k", "1", "--label-prompt", "<{label}>"
    )
    assert len(records[0]["labels"]) == 1
    assert "<car wash>" in prompts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "s", "-o", "x"], "give either --output or --store"),
        (["--store", "s", "--normalize"], "a store holds embeddings as published"),
        (["--store-dtype", "float32"], "--store-dtype is for --store"),
        (["--label-prompt", "a dog"], "--label-prompt has no {label} in it"),
        (["--attn-implementation", "flash_attention_2"], "here it runs on cpu in float32"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(
    words: list[str], message: str, run: Any
) -> None:
    code, _, stderr = run("0.png", *words)
    assert code == 2
    assert message in stderr


def test_an_encoder_that_is_none_is_one_line(run: Any, media: Path) -> None:
    code, _, message = run("0.png", "--encoder", media / "0.png")
    assert code == 1
    assert "0.png: is neither a safetensors nor a torch file" in message
    assert "\n" not in message


def test_dry_run_prints_the_command_and_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], encoder: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    words = ["encode", "--device", "cpu", "--encoder", str(encoder), "-", "--num-processes", "2"]
    assert cli.run([*words, "--dry-run"]) == (0, "")
    (line,) = capfd.readouterr().out.splitlines()
    assert line.endswith(f"-m chatbind_cli {shlex.join(words)}")


def console(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "chatbind_cli", "encode", "--device", "cpu", *map(str, args)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(1)
    for i in range(80):
        pixels = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_the_bytes_of_an_undisturbed_run(
    many: Path, tmp_path: Path, encoder: Path, run: Any
) -> None:
    names = [str(path) for path in sorted(many.iterdir())]
    output, store = tmp_path / "out.jsonl", tmp_path / "store"
    command = console("--encoder", encoder, "-o", output, *names)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b"\n") < 7:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 7 <= output.read_bytes().count(b"\n") < len(names)
    killed = subprocess.Popen(
        console("--encoder", encoder, "--store", store, *names),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    journal = store / "embeddings.sqlite-journal"
    while not journal.exists():
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(EmbeddingStore.open(store)) < len(names)

    assert run("-o", output, *names)[0] == 0
    assert run("-o", tmp_path / "undisturbed.jsonl", *names)[0] == 0
    assert output.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert run("--store", store, *names)[0] == 0
    opened = EmbeddingStore.open(store)
    assert len(opened) == len(names)
    for line in output.read_text().splitlines():
        record = json.loads(line)
        found = opened.get("image", name=record["path"])
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(record["embedding"]), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_tasks_of_srun_give_the_records_of_one_process(
    many: Path, tmp_path: Path, encoder: Path, run: Any
) -> None:
    names = [*map(str, sorted(many.iterdir())[:21]), str(many / "nothing.png")]
    assert run("-o", tmp_path / "one.jsonl", *names)[0] == 3
    root = Path(__file__).parents[2]
    srun = [sys.executable, root / "tests" / "cluster" / "srun", "--ntasks-per-node=2"]
    line = [*srun, *console("--encoder", encoder, "-o", tmp_path / "two.jsonl", *names)]
    step = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **step, "PYTHONPATH": str(root)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines() == [
        "chatbind: 21 files encoded, 1 failed",
        "chatbind: error: 1 of 22 files could not be encoded",
    ]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
