"""What `inspect` says of training data."""

from __future__ import annotations

import json
import shutil
import sys

import click
import numpy as np
import pytest
from chatbind_cli.commands.inspect import command
from scipy.io import wavfile


def test_samples_come_as_the_model_sees_them_and_then_the_figures(world, here) -> None:
    done = here("inspect", str(world.captions), "-m", str(world.llama), "--show", "1")
    assert done.code == 0, done.stderr
    sample, figures = done.records
    trained = [t for t, mark in zip(sample["tokens"], sample["trained"], strict=True) if mark]
    assert "".join(trained).replace("Ġ", " ").replace("Ċ", "\n") == " It is red.\n###"
    assert sample["media"] == [{"image": "p0.png"}]
    assert sample["tokens"].count("<im_patch>") == 1
    assert figures["samples"] == figures["looked_at"] == 16
    assert figures["media"] == {"image": 13}
    assert sum(n for _, n in figures["histogram"]) == 16
    assert figures["histogram"][-1][0] == figures["tokens"]["max"]
    assert figures["cut"] == figures["untrained"] == figures["bad"] == 0
    # the system text, and "### Human:"
    assert 0.4 < figures["prefix"] < 0.9
    assert 0 < figures["padding"] < 0.3
    assert 0 <= figures["grouped"] <= figures["padding"]
    assert 0 <= figures["packed"] < 0.1


def test_what_is_cut_is_counted(world, here) -> None:
    words = ("--model-max-length", "16", "--show", "1")
    sample, figures = here("inspect", str(world.captions), "-m", str(world.llama), *words).records
    assert sample["cut"] > 0
    assert sample["media"] == []
    assert figures["cut"] == figures["untrained"] == 1.0
    assert figures["tokens"]["max"] == 16


def test_bad_records_and_missing_media_are_named(world, here, tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.loads(world.captions.read_text())[0]
    lines = [good, {"id": "none"}, {**good, "image": "nowhere.png"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("-m", str(world.llama), "--media-root", str(world.media), "--show", "0")
    done = here("inspect", str(path), *words)
    assert done.code == 3
    record, medium, figures = done.records
    assert "neither conversations nor instruction" in record["error"]
    assert record["record"].endswith("data.jsonl:2")
    assert medium["image"] == "nowhere.png"
    assert figures["bad"] == 2
    # a file name is not looked for where nobody said in which folder
    assert here("inspect", str(path), "-m", str(world.llama), "--show", "0").records[-1]["bad"] == 1


def test_figures_of_some_samples_are_drawn_evenly(world, here) -> None:
    words = ("--limit", "4", "--show", "0")
    (figures,) = here("inspect", str(world.captions), "-m", str(world.llama), *words).records
    assert (figures["samples"], figures["looked_at"]) == (16, 4)


def test_a_person_sees_trained_words_in_colour(
    world, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = [str(world.captions), "-m", str(world.llama), "--show", "1"]
    command.main(words, standalone_mode=False, color=True)
    shown = capsys.readouterr().out
    assert click.style(" It is red.\n###", fg="green") in shown
    assert click.style("[image p0.png]", fg="magenta") in shown
    assert "16 samples" in shown


def test_one_job_at_a_time(world, here) -> None:
    assert here("inspect", "-m", str(world.llama)).code == 2
    assert here("inspect", str(world.captions)).code == 2
    plotted = ["--plot", str(world.captions.parent / "x.svg")]
    assert here("inspect", str(world.captions), "-m", str(world.llama), *plotted).code == 2


def test_a_bad_pair_is_one_failed_record(world, here, tmp_path) -> None:
    shutil.copy(world.media / "p0.png", tmp_path)
    wavfile.write(tmp_path / "tone.wav", 16_000, np.ones(48_000, np.int16))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"image": "p0.png"}\n{"image": "p0.png", "audio": "tone.wav"}\n')
    words = ["--encoder", str(world.imagebind), "--media-root", str(tmp_path)]
    done = here("inspect", "--pairs", str(pairs), *words)
    assert done.code == 3
    bad, found = done.records
    assert "pairs.jsonl:1: a pair names two media" in bad["error"]
    assert (found["first"], found["second"], found["pairs"]) == ("image", "audio", 1)
