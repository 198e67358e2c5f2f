import json
import math
import shutil

import pytest
import torch

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.toy.digits import load_items
from chatbind_cli.toy.fit import repeatable
from chatbind_cli.toy.media import relative_path, write_media
from chatbind_cli.toy.pe_av import ToyPeAv
from tests.toy.command import run_toy


@pytest.fixture(scope="module")
def toy():
    with repeatable(0):
        return ToyPeAv()


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_what_a_tower_gives_in_training_is_what_the_saved_encoder_gives(toy, modality, tmp_path):
    items = load_items()[0][:2]
    write_media(items, modality, tmp_path, seed=0)
    toy.save(tmp_path / "untrained")
    read = open_encoder(tmp_path / "untrained").read
    media = [load_media(read, tmp_path / relative_path(i, modality)) for i in items]
    batch = torch.stack([toy.prepare(medium.tensor, modality) for medium in media])
    tower = toy.tower(modality).eval()
    with torch.no_grad():
        for parameter in tower.parameters_to_train():
            parameter.mul_(1.5)
        expected = tower(batch.flatten(0, 1) if modality == "video" else batch)
    tower.finish()
    toy.save(tmp_path / "made")
    encoder = open_encoder(tmp_path / "made")
    found = encoder.embed(media, normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_the_codec_tells_how_loud_a_band_is_at_any_phase_of_its_tone(toy):
    time = torch.arange(2000) / 4000
    hertz = torch.linspace(650, 1530, 12)
    heard = [
        toy.prepare(0.1 * torch.sin(2 * math.pi * hertz[7] * time + phase)[None], "audio")[3]
        for phase in (0.0, 0.4, 1.9)
    ]
    assert {int(bands.argmax()) for bands in heard} == {7}
    torch.testing.assert_close(heard[0], heard[2], rtol=0.02, atol=0.01)
    silence = toy.prepare(torch.zeros(1, 2000), "audio")
    assert silence.abs().max() == 0


def test_a_world_that_is_there_gets_its_second_encoder(quick_world, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(quick_world[0], world)
    before = (world / "imagebind/imagebind.safetensors").stat().st_mtime_ns
    code, records, problem = run_toy(str(world), "--quick", "--huggingface")
    assert code == 0, problem
    done = {r["stage"] for r in records if r.get("status") == "done"}
    assert done == {"pe-av", "toy"}
    assert (world / "imagebind/imagebind.safetensors").stat().st_mtime_ns == before
    figures = json.loads((world / "toy.json").read_text())["nearest_class_mean_accuracy"]
    assert list(figures) == ["imagebind", "imagebind-unbound", "pe-av", "pe-av-unbound"]
    assert list(figures["pe-av"]) == ["image", "video", "audio"]
    assert "pe-av/  " in (world / "README.txt").read_text()

    bound, unbound = (open_encoder(world / name) for name in ("pe-av", "pe-av-unbound"))
    assert bound.modalities == ("image", "video", "audio", "text")
    sound = load_media(bound.read, world / "media/audio/heldout-0000.wav")
    picture = load_media(bound.read, world / "media/image/heldout-0000.png")
    rows, others = (e.embed([picture, sound], normalize=True) for e in (bound, unbound))
    torch.testing.assert_close(rows[0], others[0])
    assert (rows[1] - others[1]).abs().max() > 1e-3

    code, records, _ = run_toy(str(world), "--quick", "--huggingface")
    assert {r["status"] for r in records if "status" in r} == {"there already"}
