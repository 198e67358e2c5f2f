"""What a harness asks, made into requests: without the harness, which has an environment apart."""

from __future__ import annotations

import base64
import importlib
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import wavfile

from chatbind_cli.errors import MediaError, RecordError, UsageError
from chatbind_cli.harness import TASKS
from chatbind_cli.harness.messages import as_chat, settings_of
from chatbind_cli.harness.toy import accuracy, messages
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.openai_chat import read_chat_request
from chatbind_cli.media.medium import Medium


def content(*parts):
    [message] = as_chat([{"role": "user", "content": list(parts)}])
    return message["content"]


def sent(modality, medium):
    """The bytes that go out for a medium."""
    [part] = content({"type": modality, "url": medium})
    assert (part["type"], part["modality"]) == ("media", modality)
    head, _, body = part["url"].partition(",")
    assert head == "data:;base64"
    return base64.b64decode(body)


def test_every_modality_gets_to_the_question_in_its_place():
    said = [{"type": "text", "text": "An <image> beside"}, {"type": "depth", "url": "d.png"}]
    said += [{"type": "imu", "url": "i.csv"}, {"type": "text", "text": "What?"}]
    chat = as_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": said}])
    names = {"model_id": "m", "request_id": "task/test/3"}
    question = read_chat_request(
        {"messages": chat}, settings=GenerationSettings(), **names
    ).question
    assert question.media == (Medium("depth", "d.png"), Medium("imu", "i.csv"))
    assert question.text == "An <image> beside\n<depth>\n<imu>\nWhat?"
    assert (question.system, question.id) == ("Be brief.", "task/test/3")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "F", "I;16"])
def test_a_picture_in_memory_goes_out_as_it_is(mode):
    gradient = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    picture = Image.new(mode, (8, 8), 700) if mode == "I;16" else gradient.convert(mode)
    read = Image.open(io.BytesIO(sent("image", picture)))
    wanted = picture if mode in ("L", "RGB", "RGBA", "I;16") else picture.convert("RGB")
    assert np.array_equal(np.asarray(read), np.asarray(wanted))


@pytest.mark.parametrize("shape", [(800,), (2, 800)])
def test_a_waveform_goes_out_as_it_is(shape):
    wave = np.random.default_rng(0).uniform(-1, 1, shape)
    rate, read = wavfile.read(
        io.BytesIO(sent("audio", {"array": wave, "sampling_rate": 8000, "path": None}))
    )
    assert rate == 8000
    assert np.array_equal(read.T, wave.astype(np.float32))


def test_bytes_and_files_of_a_dataset():
    assert sent("thermal", b"content") == b"content"
    assert sent("image", {"bytes": b"content", "path": "a.png"}) == b"content"
    [part] = content({"type": "video", "url": {"bytes": None, "path": "a.mp4"}})
    assert part == {"type": "media", "modality": "video", "url": "a.mp4"}


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"type": "depth", "url": None}, "a NoneType cannot be read as depth"),
        ({"type": "depth"}, "a NoneType cannot be read as depth"),
        ({"type": "video", "url": ["a.png"]}, "a list cannot be read as video"),
        ({"type": "audio", "url": {"array": ["x"], "sampling_rate": 1}}, "is no sound"),
        ({"type": "audio", "url": {"array": [0.0]}}, "is no sound"),
        ({"type": "audio", "url": {"array": [0.0], "sampling_rate": -1}}, "is no sound"),
        ({"type": "video", "url": "a.mp4", "start_time": 0.0}, "only all of it"),
    ],
)
def test_what_is_no_medium_is_refused(part, complaint):
    with pytest.raises(RecordError, match=complaint):
        content(part)


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ({}, {}),
        ({"until": None, "max_new_tokens": 16}, {"max_new_tokens": 16}),
        ({"until": ["\n\n", ""], "image_aspect_ratio": "pad"}, {"stop": ("\n\n",)}),
        ({"until": "###"}, {"stop": ("###",)}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0.5, "top_p": None}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False, "top_k": 5}, {}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"do_sample": True, "temperature": 0, "top_p": 0}, {}),
        ({"temperature": 0, "top_p": None, "num_beams": 3}, {"num_beams": 3}),
    ],
)
def test_how_a_task_wants_its_answers(wanted, settings):
    assert settings_of(wanted) == GenerationSettings(**settings)


def test_a_setting_out_of_range_is_refused():
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        settings_of({"max_new_tokens": 0})


def test_a_record_of_the_toy_world_is_asked_and_judged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "media" / "imu" / "a.csv"
    path.parent.mkdir(parents=True)
    path.touch()
    record = {"question_id": "1", "imu": "imu/a.csv", "depth": None, "text": "Which digit is this?"}
    record["answer"] = "This is a two."
    [message] = messages(record)
    text, medium = message["content"]
    assert text == {"type": "text", "text": "Which digit is this?"}
    assert medium == {"type": "imu", "url": str(path)}
    assert accuracy(record, ["This is a two."]) == {"accuracy": 1.0}
    assert accuracy(record, ["This is a six."]) == {"accuracy": 0.0}
    with pytest.raises(MediaError, match="leaves the media root"):
        messages({**record, "imu": "../eval/a.csv"})


def test_tasks_name_files_of_the_toy_world_and_functions_that_are_there(quick_world):
    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        module, _, name = loader.construct_scalar(node).rpartition(".")
        return getattr(importlib.import_module(module), name)

    Loader.add_constructor("!function", function)
    tasks = {}
    for path in TASKS.glob("[a-z]*.yaml"):
        task = yaml.load(path.read_text(), Loader)
        common = yaml.load((TASKS / task.pop("include")).read_text(), Loader)
        tasks[task["task"]] = {**common, **task}
    assert sorted(tasks) == [f"chatbind_{m}" for m in ("depth", "image", "imu", "thermal")]
    for name, task in tasks.items():
        file = quick_world[0] / task["dataset_kwargs"]["data_files"]["test"]
        record = json.loads(file.read_text().splitlines()[0])
        assert name.removeprefix("chatbind_") in record
        assert task["doc_to_messages"] is messages
        assert task["process_results"] is accuracy
        assert {record[task["doc_to_text"]], record[task["doc_to_target"]]} < set(record.values())
