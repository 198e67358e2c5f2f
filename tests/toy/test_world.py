import json
import shutil

import pytest

from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError
from chatbind_cli.model.tokenizer import load_tokenizer
from chatbind_cli.toy import encoders, world
from chatbind_cli.toy.world import make_world
from tests.toy.command import run_toy

LAYOUT = [
    "README.txt",
    "delta/model.safetensors",
    "eval/answers-model-audio.jsonl",
    "eval/answers-reference-imu.jsonl",
    "eval/contexts.jsonl",
    "eval/questions-thermal.jsonl",
    "eval/reviews-audio.jsonl",
    "imagebind/config.json",
    "imagebind/imagebind.safetensors",
    "imagebind-unbound/imagebind.safetensors",
    "llama/config.json",
    "llama/model.safetensors",
    "llama/tokenizer.json",
    "media/audio/heldout-0000.wav",
    "media/depth/heldout-0000.png",
    "media/image/train-0063.png",
    "media/imu/heldout-0000.csv",
    "media/thermal/heldout-0000.png",
    "media/video/heldout-0009.mp4",
    "model/model.safetensors",
    "stage1/embeddings",
    "stage1/projector.safetensors",
    "toy.json",
    "train/captions.json",
    "train/instructions.json",
]


def make(folder, *, seed=0, overwrite=False):
    make_world(folder, seed=seed, quick=True, overwrite=overwrite, tell=lambda record: None)


def _content(folder):
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    # what the program itself makes says where and when, too
    made = ("stage1", "model", "delta")
    return {
        str(path): (folder / path).read_bytes()
        for path in files
        if path.parts[0] not in made or path.as_posix() == "model/model.safetensors"
    }


def test_everything_that_the_readme_promises_is_there(quick_world):
    folder, records = quick_world
    assert not [name for name in LAYOUT if not (folder / name).exists()]
    assert records[-1]["artifact"] == "toy"
    assert records[-1]["path"] == str(folder.resolve())
    losses = [record for record in records if "loss" in record]
    assert {record["part"] for record in losses} == {
        "text", "image", "audio", "depth", "thermal", "imu",
    }  # fmt: skip
    for line in (folder / "README.txt").read_text().splitlines():
        name = line.split("  ")[0].rstrip("/")
        if name.startswith(("media/", "train/", "eval/", "llama", "imagebind", "toy.json")):
            assert list(folder.glob(name if "*" in name else f"{name}*")), name


def test_questions_and_conversations_name_files_that_are_there(quick_world):
    folder, _ = quick_world
    for record in json.loads((folder / "train/captions.json").read_text()):
        assert (folder / "media" / record["image"]).is_file()
    for path in folder.glob("eval/questions-*.jsonl"):
        modality = path.stem.removeprefix("questions-")
        for line in path.read_text().splitlines():
            assert (folder / "media" / json.loads(line)[modality]).is_file()


def test_the_figures_are_measured_for_both_encoders(quick_world):
    folder, _ = quick_world
    summary = json.loads((folder / "toy.json").read_text())
    figures = summary["nearest_class_mean_accuracy"]
    assert list(figures) == ["imagebind", "imagebind-unbound"]
    for shares in figures.values():
        assert list(shares) == ["image", "video", "audio", "depth", "thermal", "imu"]
        assert all(0 <= share <= 1 for share in shares.values())
    assert summary["seed"] == 0


def test_the_unbound_encoder_has_the_same_image_tower_and_other_towers(quick_world):
    from safetensors.torch import load_file

    folder, _ = quick_world
    bound = load_file(folder / "imagebind/imagebind.safetensors")
    unbound = load_file(folder / "imagebind-unbound/imagebind.safetensors")
    assert bound.keys() == unbound.keys()
    for name, tensor in bound.items():
        if ".vision." in name:
            assert tensor.equal(unbound[name]), name
    for tower in ("audio", "depth", "thermal", "imu"):
        name = f"modality_trunks.{tower}.blocks.0.attn.in_proj_weight"
        assert not bound[name].equal(unbound[name])


def test_the_base_models_load_where_other_commands_load_them(quick_world):
    folder, _ = quick_world
    encoder = open_encoder(folder / "imagebind")
    assert set(encoder.modalities) == {"image", "video", "audio", "depth", "thermal", "imu"}
    assert load_tokenizer(folder / "llama").eos_token == "</s>"


def test_a_second_run_does_nothing_again(quick_world):
    folder, _ = quick_world
    before = _content(folder)
    code, records, _ = run_toy(str(folder), "--quick")
    assert code == 0
    assert {r["status"] for r in records if "status" in r} == {"there already"}
    assert records[-1]["artifact"] == "toy"
    assert _content(folder) == before


@pytest.fixture
def no_commands(monkeypatch):
    """Leaves out what other commands make: they are what takes time, and have their own tests."""
    monkeypatch.setattr(world, "run_commands", lambda folder, **options: None)


def _own(folder):
    """What of a world the other commands have no part in."""
    later = ("toy.json", "eval/answers-model-audio.jsonl", "eval/reviews-audio.jsonl")
    return {
        name: data
        for name, data in _content(folder).items()
        if name not in later and not name.startswith(("model/", ".chatbind", "."))
    }


def test_a_stopped_run_goes_on_and_ends_with_the_same_world(
    quick_world, tmp_path, monkeypatch, no_commands
):
    folder, _ = quick_world
    stopped = tmp_path / "stopped"

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoders, "bind", stop)  # untrained weights lie there by now
        with pytest.raises(KeyboardInterrupt):
            make(stopped)
    assert "nearest_class_mean_accuracy" not in json.loads((stopped / "toy.json").read_text())
    with pytest.raises(ChatBindError, match=r"other settings \(seed 0\)"):
        make(stopped, seed=5)
    code, records, problem = run_toy(str(stopped), "--quick")
    assert code == 0, problem
    statuses = {r["stage"]: r["status"] for r in records if "status" in r}
    assert statuses["llama"] == "there already"
    assert statuses["imagebind"] == "done"
    assert _own(stopped) == _own(folder)


def test_another_seed_is_refused_and_says_what_to_do(quick_world):
    folder, _ = quick_world
    with pytest.raises(ChatBindError, match=r"other settings \(seed 0\); say --overwrite"):
        make(folder, seed=5)


def test_a_folder_with_something_else_is_left_alone_even_with_overwrite(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/holiday.jpg").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ChatBindError, match=r"media/holiday\.jpg: is on no record"):
            make(tmp_path, overwrite=overwrite)
    assert (tmp_path / "media/holiday.jpg").read_bytes() == b"mine"


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ChatBindError, match="is a file; name a folder"):
        make(tmp_path / "x")


def test_overwrite_makes_the_world_of_another_seed(quick_world, tmp_path, no_commands):
    folder, _ = quick_world
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stray = copy / "media/image/stray.png"
    stray.write_bytes(b"")
    code, _, problem = run_toy(str(copy), "--quick", "--overwrite", "--seed", "5")
    assert code == 1 and "stray.png: is on no record" in problem
    assert {**_content(copy), "media/image/stray.png": None} == {
        **_content(folder),
        "media/image/stray.png": None,
    }
    stray.unlink()
    code, _, problem = run_toy(str(copy), "--quick", "--overwrite", "--seed", "5")
    assert code == 0, problem
    assert json.loads((copy / "toy.json").read_text())["seed"] == 5
    assert not (copy / "model").exists()
    name = "media/audio/heldout-0000.wav"
    assert (copy / name).read_bytes() != (folder / name).read_bytes()
