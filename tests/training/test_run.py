"""Whole runs on a CPU: what they make, what they leave alone, how they end."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.checkpoints.projector_file import read_projector
from chatbind_cli.jsonl import read_records
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.training.trainer import ChatBindTrainer
from tests.training.conftest import DIM

FAST = ("--max-steps", "3", "--learning-rate", "0.01")


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pretrain_logs_records_and_ends_with_the_checkpoint(world, here, tmp_path) -> None:
    done = here("pretrain", *world.args(tmp_path / "out", *FAST))
    assert done.code == 0, done.stderr
    *log, last = done.records
    assert [record["step"] for record in log] == [1, 2, 3]
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= log[0].keys()
    assert {"samples_per_s", "tokens_per_s", "data_wait"} <= log[0].keys()
    assert last["artifact"] == "checkpoint"
    assert last["path"] == str(tmp_path / "out")
    assert last["made_by"] == "pretrain"
    assert last["sha256"] == sha256(tmp_path / "out" / "projector.safetensors")
    kept = [record for record, _ in read_records(tmp_path / "out" / "log.jsonl")]
    assert kept == log
    assert (tmp_path / "out" / "loss.svg").read_text().rstrip().endswith("</svg>")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "pretrain trains the projector and the embeddings of" in done.stderr


def test_stage_1_saves_what_it_trained_and_no_language_model(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    assert here("pretrain", *world.args(out, *FAST)).code == 0
    weights = list(out.rglob("*.safetensors"))
    assert {path.name for path in weights} == {"projector.safetensors", "trained.safetensors"}
    # 38 thousand parameters would be 150 kB
    assert sum(path.stat().st_size for path in weights) < 20_000
    made = read_projector(out / "projector.safetensors")
    assert made.info.stage == "pretrain"
    assert made.info.encoder["name"] == "tiny"
    assert {"im_start", "im_end"} <= made.token_embeddings.keys()
    config = json.loads((out / "config.json").read_text())
    assert config["provenance"]["command"].startswith("chatbind pretrain -m")
    assert config["use_cache"]


def test_extract_projector_reads_the_folder_and_its_checkpoints(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    here("pretrain", *world.args(out, *FAST))
    for source in (out, out / "checkpoint-3"):
        done = here("extract-projector", str(source), "-o", str(tmp_path / "p.safetensors"))
        assert done.code == 0, done.stderr
        taken = read_projector(tmp_path / "p.safetensors")
        own = read_projector(out / "projector.safetensors")
        for name, tensor in own.tensors.items():
            assert torch.equal(taken.tensors[name], tensor)


def test_finetune_makes_a_model_folder_from_a_projector(world, here, tmp_path) -> None:
    projector = tmp_path / "pre" / "projector.safetensors"
    here("pretrain", *world.args(tmp_path / "pre", *FAST, "--tokens-per-embedding", "2"))
    out = tmp_path / "out"
    done = here("finetune", *world.args(out, *FAST, "--projector", str(projector)))
    assert done.code == 0, done.stderr
    assert done.records[-1]["artifact"] == "model"
    assert "finetune trains the projector and the language model" in done.stderr
    bundle = load_chatbind(out)
    assert bundle.config.stage == "finetune"
    assert bundle.config.tokens_per_embedding == 2
    assert bundle.config.prompt_style == "v0"
    before = load_file(world.llama / "model.safetensors")
    after = bundle.model.language_model.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    start = read_projector(projector).tensors["projector.layers.0.weight"]
    moved = (bundle.model.projector.layers[0].weight - start).abs().max()
    assert 0 < moved < 0.1


def test_a_frozen_language_model_stays_as_it_is(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    done = here("finetune", *world.args(out, *FAST, "--freeze-backbone"))
    assert done.code == 0, done.stderr
    before = load_file(world.llama / "model.safetensors")
    after = load_file(out / "model.safetensors")
    for name, tensor in before.items():
        rows = len(tensor)  # the vocabulary has grown
        assert torch.equal(after[f"language_model.{name}"][:rows], tensor), name


def test_the_attention_that_is_named_is_used_or_refused(world, here, tmp_path) -> None:
    words = ["finetune", *world.args(tmp_path / "out", *FAST), "--attn-implementation"]
    refused = here(*words, "flash_attention_2")
    assert refused.code == 2
    assert "--attn-implementation flash_attention_2: it needs an NVIDIA GPU" in refused.stderr
    assert not (tmp_path / "out").exists()
    eager = here(*words, "eager")
    assert eager.code == 0, eager.stderr


def test_training_lowers_the_loss(world, here, tmp_path) -> None:
    words = ("--num-train-epochs", "12", "--learning-rate", "0.01", "--logging-steps", "8")
    done = here("finetune", *world.args(tmp_path / "out", *words))
    losses = [record["loss"] for record in done.records[:-1]]
    assert losses[-1] < 0.5 * losses[0]


def test_media_on_disk_and_a_store_of_them_train_alike(world, here, tmp_path) -> None:
    from_media, from_store = tmp_path / "media", tmp_path / "store"
    done = here("pretrain", *world.args(from_media, *FAST, source="media"))
    assert done.code == 0, done.stderr
    words = world.args(from_store, *FAST)
    words[words.index("--store") + 1] = str(from_media / "embeddings")
    assert here("pretrain", *words).code == 0
    one = read_projector(from_media / "projector.safetensors")
    other = read_projector(from_store / "projector.safetensors")
    assert one.info.encoder["sha256"] == other.info.encoder["sha256"]
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor)


def test_a_finished_run_only_says_what_it_made(world, here, tmp_path) -> None:
    words = ("pretrain", *world.args(tmp_path / "out", *FAST))
    first = here(*words)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.name != ".lock"}
    again = here(*words)
    assert again.code == 0
    assert again.records == first.records[-1:]
    assert "this run is finished, nothing was trained" in again.stderr
    assert "nothing was trained" not in first.stderr
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_other_arguments_over_a_run_need_overwrite(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    here("pretrain", *world.args(out, *FAST))
    other = world.args(out, *FAST, "--seed", "7")
    refused = here("pretrain", *other)
    assert refused.code == 1
    assert refused.stderr.splitlines()[-1].endswith(
        "holds a run with seed 0, and this one has 7; "
        "choose another --output-dir, or say --overwrite"
    )
    before = sha256(out / "projector.safetensors")
    assert here("pretrain", *other, "--overwrite").code == 0
    assert sha256(out / "projector.safetensors") != before


def test_a_changed_data_file_is_noticed(world, here, tmp_path) -> None:
    data = tmp_path / "captions.json"
    shutil.copy(world.captions, data)
    words = world.args(tmp_path / "out", *FAST)
    words[words.index("--data") + 1] = str(data)
    assert here("pretrain", *words).code == 0
    data.write_text(json.dumps(json.loads(data.read_text())[:9]))
    assert "holds a run with data-sha256" in here("pretrain", *words).stderr


def test_broken_media_stop_the_run_before_it_begins(world, here, tmp_path) -> None:
    media = tmp_path / "media"
    shutil.copytree(world.media, media)
    (media / "p1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    words = world.args(tmp_path / "out", *FAST, source="media")
    words[words.index("--media-root") + 1] = str(media)
    failed = here("pretrain", *words)
    assert failed.code == 1
    assert failed.stdout == ""
    last = failed.stderr.splitlines()[-1]
    assert "1 record(s) or media cannot be used: " in last
    assert "p1.png" in last
    assert last.endswith("mend them, or leave them out with --on-error skip")
    assert not (tmp_path / "out").exists()

    skipped = here("pretrain", *words, "--on-error", "skip")
    assert skipped.code == 0, skipped.stderr
    assert "15 conversations with 7 different media, 1 input(s) left out" in skipped.stderr
    assert skipped.records[-1]["left_out"] == 1


def test_records_that_make_no_sense_are_named(world, here, tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    good = world.instructions.read_text()
    data.write_text(good + '{"id": "x", "conversations": []}\n')
    words = world.args(tmp_path / "out", *FAST)
    words[words.index("--data") + 1] = str(data)
    failed = here("pretrain", *words)
    assert failed.code == 1
    assert f"{data}:17" in failed.stderr
    assert not (tmp_path / "out").exists()
    assert here("pretrain", *words, "--on-error", "skip").code == 0


def test_media_that_a_store_lacks_are_named(world, here, tmp_path) -> None:
    data = tmp_path / "data.json"
    data.write_text(world.captions.read_text().replace("p2.png", "q2.png"))
    words = world.args(tmp_path / "out", *FAST)
    words[words.index("--data") + 1] = str(data)
    failed = here("pretrain", *words)
    assert failed.code == 1
    assert "q2.png: the store has no embedding of this image" in failed.stderr


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("-m", "nowhere", "is no folder of a language model"),
        ("--data", "nowhere.json", "nowhere.json: No such file"),
        ("--media-root", "/", "no such file"),
    ],
)
def test_missing_inputs_are_errors_of_one_line(
    world, here, tmp_path, option: str, value: str, told: str
) -> None:
    words = world.args(tmp_path / "out", *FAST, source="media")
    words[words.index(option) + 1] = value
    failed = here("pretrain", *words)
    assert failed.code == 1
    assert failed.stdout == ""
    assert told in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_without_an_encoder_the_error_says_where_it_was_looked_for(
    world, here, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = world.args(tmp_path / "out", *FAST)
    at = words.index("--store")
    del words[at : at + 2]
    words += ["--media-root", str(world.media)]
    failed = here("pretrain", *words)
    assert "no encoder at checkpoints/imagebind or .checkpoints/imagebind_huge.pth" in failed.stderr
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "imagebind").symlink_to(world.imagebind)
    assert here("pretrain", *words).code == 0


def test_text_only_data_need_neither_media_nor_encoder(world, here, tmp_path) -> None:
    data = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = world.args(tmp_path / "out", *FAST)
    at = words.index("--store")
    del words[at : at + 2]
    words[words.index("--data") + 1] = str(data)
    done = here("finetune", *words)
    assert done.code == 0
    assert "assuming embeddings of width 1024" in done.stderr
    # what is known of the encoder counts: the option, or the model to go on from
    words[words.index("-o") + 1] = str(tmp_path / "with")
    done = here("finetune", *words, "--encoder", str(world.imagebind))
    assert done.code == 0, done.stderr
    assert load_chatbind(tmp_path / "with").config.embedding_dim == DIM
    words[words.index("-o") + 1] = str(tmp_path / "on")
    words[words.index("-m") + 1] = str(tmp_path / "with")
    done = here("finetune", *words)
    assert done.code == 0, done.stderr
    assert "assuming" not in done.stderr
    config = load_chatbind(tmp_path / "on").config
    assert (config.embedding_dim, config.encoder["name"]) == (DIM, "imagebind")


def test_how_a_store_was_made_is_part_of_the_model(world, here, tmp_path) -> None:
    encode = ["encode", "--encoder", str(world.imagebind), "--device", "cpu"]
    encode += ["--data", str(world.captions), "--media-root", str(world.media)]
    for name in ("imagebind", "chatbind"):
        done = here(*encode, "--store", str(tmp_path / name), "--clip-sampler", name)
        assert done.code == 0, done.stderr

    def words(output: str, store: str) -> list[str]:
        made = world.args(tmp_path / output, *FAST)
        made[made.index("--store") + 1] = str(tmp_path / store)
        return made

    assert here("pretrain", *words("pre", "chatbind")).code == 0
    projector = tmp_path / "pre" / "projector.safetensors"
    info = read_projector(projector).info
    assert info.media_options["clip_sampler"] == "chatbind"
    assert info.encoder["dtype"] == "float32"
    on = ("--projector", str(projector))
    refused = here("finetune", *words("out", "imagebind"), *on)
    assert refused.code == 1
    assert "the store has clip_sampler imagebind, what training goes on from has" in refused.stderr
    assert here("finetune", *words("out", "chatbind"), *on).code == 0
    assert load_chatbind(tmp_path / "out").config.media_options["clip_sampler"] == "chatbind"


def test_samples_that_are_cut_before_their_answer_do_no_harm(world, here, tmp_path) -> None:
    # one sample is short enough to be learned from
    said = [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]
    short = {"id": "s", "conversations": said}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*json.loads(world.captions.read_text()), short]))
    words = world.args(tmp_path / "out", *FAST, "--model-max-length", "90")
    words[words.index("--data") + 1] = str(data)
    done = here("finetune", *words)
    assert done.code == 0, done.stderr
    assert "16 of the 17 longest samples are cut before their first answer" in done.stderr
    assert [record["loss"] for record in done.records[:-1]].count(0.0) >= 2


def test_a_loss_that_is_not_a_number_ends_the_run(world, here, tmp_path) -> None:
    done = here("finetune", *world.args(tmp_path / "out", "--learning-rate", "1e38"))
    assert done.code == 1
    assert "the loss is not a number any more at step" in done.stderr


@pytest.mark.parametrize(("dtype", "mixed"), [("bfloat16", "--bf16"), ("float16", "--fp16")])
def test_weights_that_train_are_not_held_in_half(world, here, tmp_path, dtype, mixed) -> None:
    words = world.args(tmp_path / "out", *FAST, "--dtype", dtype)
    refused = here("finetune", *words)
    assert refused.code == 2
    assert f"; say {mixed}, which computes so, and keeps the trained weights in" in refused.stderr
    # frozen ones may be
    kept = here("finetune", *words, "--freeze-backbone")
    assert kept.code == 0, kept.stderr


def test_a_model_is_kept_in_the_numbers_that_are_asked_for(world, here, tmp_path) -> None:
    words = [*FAST, "--bf16", "True"]
    whole = here("finetune", *world.args(tmp_path / "a", *words, "--save-dtype", "float32"))
    assert whole.code == 0, whole.stderr
    assert "rounding" not in whole.stderr
    half = here("finetune", *world.args(tmp_path / "b", *words))
    said = re.search(
        r"saved in bfloat16: rounding has changed the weights by (\S+) of", half.stderr
    )
    assert said is not None
    assert 0.0005 < float(said[1]) < 0.003  # 2^-9 at most for each, which has 8 bits
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(tensor.bfloat16(), b[name]) for name, tensor in a.items())
    assert load_chatbind(tmp_path / "a").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (("--max-steps", "2", "--logging-steps", "10"), [2]),
        (("--max-steps", "5", "--logging-steps", "3"), [3, 5]),
        (("--num-train-epochs", "0"), []),
        (("--max-steps", "0"), []),
    ],
)
def test_the_last_step_is_logged_if_there_is_one(world, here, tmp_path, words, steps) -> None:
    out = tmp_path / "out"
    done = here("pretrain", *world.args(out, *words))
    assert done.code == 0, done.stderr
    *log, made = done.records
    assert [record["step"] for record in log] == steps
    assert made["steps"] == max(steps, default=0)
    assert (out / "loss.svg").exists() == bool(steps)
    read_projector(out / "projector.safetensors")
    assert here("pretrain", *world.args(out, *words)).records == [made]


def test_what_trackers_print_stays_out_of_the_records(world, here, tmp_path, monkeypatch) -> None:
    step = ChatBindTrainer.training_step

    def talking(self: ChatBindTrainer, *args: object, **kwargs: object) -> object:
        print("* View the run at http://127.0.0.1")
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatBindTrainer, "training_step", talking)
    done = here("pretrain", *world.args(tmp_path / "out", *FAST))
    assert [record.get("step") for record in done.records] == [1, 2, 3, None]
    assert done.stderr.count("* View the run") == 3


def test_held_out_conversations_are_measured(world, here, tmp_path) -> None:
    words = ("--eval-data", str(world.instructions), "--evaluation-strategy", "steps")
    done = here("pretrain", *world.args(tmp_path / "out", *FAST, *words, "--eval-steps", "3"))
    assert done.code == 0, done.stderr
    measured = [record["eval_loss"] for record in done.records if "eval_loss" in record]
    assert len(measured) == 1
    assert 5 < measured[0] < 6.5  # ln(320) = 5.8: a random model knows nothing


def test_at_a_terminal_a_person_reads_a_line_and_no_records(
    world, here, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    done = here("pretrain", *world.args(tmp_path / "out", *FAST))
    assert done.stdout.startswith(f"checkpoint: {tmp_path / 'out'}  (SHA-256 ")
    assert done.stdout.count("\n") == 1
    # stderr is none here: one line a minute
    told = [line for line in done.stderr.splitlines() if " step " in line]
    assert len(told) == 1
    assert re.search(r"step 1/3, loss 5\.\d{4}, .* samples/s, .* tokens/s, .* left$", told[0])


def test_a_projector_comes_through_a_pipe(world, program, tmp_path, monkeypatch) -> None:
    import io

    from chatbind_cli.cli import run

    projector = tmp_path / "pre" / "projector.safetensors"
    record = {"artifact": "projector", "path": str(projector)}
    words = ["finetune", *world.args(tmp_path / "out", *FAST, "--projector", "-")]

    class Stdin:
        buffer = io.BytesIO((json.dumps(record) + "\n").encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    code, message = run(words)
    assert code == 1
    assert "the stage before named it, but it is not there" in message

    run(["pretrain", *world.args(tmp_path / "pre", *FAST)])
    Stdin.buffer = io.BytesIO((json.dumps(record) + "\n").encode())
    assert run(words) == (0, "")
    Stdin.buffer = io.BytesIO(b"")
    code, message = run([*words, "--overwrite"])
    assert code == 1
    assert "standard input ended without a record of a projector" in message
