"""What a run reads is looked at once, by the process that the user started."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.training.data_files import DataFile
from chatbind_cli.training.inputs import (
    check_inputs,
    parent_tells,
    telling_workers,
    told_by_parent,
)
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.worker import STATUS_FOLDER


@pytest.fixture
def settings(world, tmp_path: Path) -> TrainingSettings:
    records = json.loads(world.captions.read_text())
    records += [{**records[0], "image": "gone.png"}, {"id": "no conversations"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    return TrainingSettings(
        stage="pretrain",
        model=world.llama,
        data=(DataFile(data),),
        output=tmp_path / "out",
        media_root=MediaRoot(world.media),
        encoders=(str(world.imagebind),),
        on_error="skip",
    )


def test_what_cannot_be_used_is_left_out_with_the_reason(settings: TrainingSettings) -> None:
    inputs = check_inputs(settings)
    assert len(inputs.conversations) == 16
    assert "gone.png" not in {medium.name for medium in inputs.media}
    record, medium = inputs.rejected
    assert record["record"] == f"{settings.data[0].path}[17]"
    assert medium["image"] == "gone.png"
    assert "no such file" in medium["error"]


def test_a_worker_waits_for_its_parent_s_word(
    settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_inputs(settings)
    monkeypatch.setenv(STATUS_FOLDER, str(tmp_path))
    with telling_workers() as tell, ThreadPoolExecutor(1) as worker:
        assert parent_tells()
        word = worker.submit(told_by_parent)
        with pytest.raises(TimeoutError):
            word.result(timeout=0.2)
        tell(found, tmp_path)
        told = word.result(timeout=10)
    assert not parent_tells()
    assert told.rejected == found.rejected
    assert list(told.media) == list(found.media)
    assert list(told.conversations) == list(found.conversations)


def test_nothing_usable_is_an_error_even_where_bad_records_are_skipped(
    settings: TrainingSettings, world
) -> None:
    record = json.loads(world.captions.read_text())[0]
    settings.data[0].path.write_text(json.dumps([{**record, "image": "gone.png"}]))
    with pytest.raises(RecordError, match=r"cannot be used: .*gone\.png"):
        check_inputs(settings)


def test_a_file_may_have_a_weight(tmp_path: Path) -> None:
    (tmp_path / "c.json:2").write_text("[]")
    read = [
        DataFile.parse(text)
        for text in ("a.json", "b.json:0.5", f"{tmp_path}/c.json:2", "d:e", ":3", "f.json:2")
    ]
    assert [(str(file.path), file.weight) for file in read] == [
        ("a.json", 1),
        ("b.json", 0.5),
        (f"{tmp_path}/c.json:2", 1),
        ("d:e", 1),
        (":3", 1),
        ("f.json", 2),
    ]
    for bad in ("a:0", "a:-1", "a:nan", "a:101"):
        with pytest.raises(UsageError, match="the weight must be above 0"):
            DataFile.parse(bad)


def test_several_files_are_one_epoch(settings: TrainingSettings, world) -> None:
    files = (DataFile(world.captions, 0.25), DataFile(world.instructions, 2))
    inputs = check_inputs(replace(settings, data=files))
    assert len(inputs.conversations) == 4 + 32
    assert {str(world.captions), str(world.instructions)} == {
        c.where.rstrip("[]:0123456789") for c in inputs.conversations
    }
    other = replace(settings, data=files, seed=1)
    assert list(check_inputs(other).conversations) != list(inputs.conversations)
    assert other.identity(1)["data"] == [f"{world.captions}:0.25", f"{world.instructions}:2"]
    with pytest.raises(RecordError, match="no conversation is drawn"):
        check_inputs(replace(settings, data=(DataFile(world.captions, 0.01),)))


def test_a_picture_that_could_not_be_drawn_is_refused_before_the_work(
    settings: TrainingSettings,
) -> None:
    with pytest.raises(UsageError, match="no suffix that we draw"):
        check_inputs(replace(settings, plot=Path("loss.gif")))


def test_the_words_of_data_are_files_and_weights(world, here, tmp_path: Path, monkeypatch) -> None:
    read: list[TrainingSettings] = []

    def stop(settings: TrainingSettings) -> None:
        read.append(settings)
        raise RecordError("enough")

    monkeypatch.setattr("chatbind_cli.training.inputs.check_inputs", stop)
    words = world.args(tmp_path / "out", "--data", "b.json:2", "c.json", "--max-steps", "1")
    assert "enough" in here("pretrain", *words).stderr
    files = DataFile(world.captions), DataFile(Path("b.json"), 2), DataFile(Path("c.json"))
    assert read[0].data == files
    done = here("pretrain", *words, "--data", "d.json:0")
    assert (done.code, "--data d.json:0: the weight must be above 0" in done.stderr) == (2, True)
