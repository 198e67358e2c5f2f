import pytest
import torch

from chatbind_cli.toy import towers
from chatbind_cli.toy.cells import Tower, patch_weight, to_cells
from chatbind_cli.toy.fit import repeatable


def test_cells_are_means_of_seven_by_seven_pixels():
    pixels = torch.rand(2, 3, 224, 224)
    cells = to_cells(pixels)
    assert cells.shape == (2, 3, 32, 32)
    torch.testing.assert_close(cells[1, 2, 4, 5], pixels[1, 2, 28:35, 35:42].mean())


@pytest.mark.parametrize(
    ("modality", "shape"),
    [
        ("image", (3, 224, 224)),
        ("video", (3, 2, 224, 224)),
        ("depth", (1, 224, 224)),
        ("thermal", (1, 224, 224)),
    ],
)
def test_spread_weights_give_on_full_pictures_what_the_tower_gave_on_cells(modality, shape):
    with repeatable(0):
        model = towers.new_model([modality])
        tower = Tower(model, modality)
    pixels = torch.rand(2, *shape)
    with torch.no_grad():
        coarse = tower(to_cells(pixels))
        tower.spread()
        full = torch.nn.functional.normalize(model.embed(modality, pixels), dim=-1)
    # sums of thousands of float32 numbers in another order
    torch.testing.assert_close(full, coarse, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("modality", "shape"), [("audio", (1, 128, 204)), ("imu", (6, 2000))])
def test_sounds_and_motion_go_through_the_encoders_own_stem(modality, shape):
    with repeatable(0):
        model = towers.new_model([modality])
        tower = Tower(model, modality)
    batch = torch.rand(2, *shape)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.embed(modality, batch), dim=-1)
        torch.testing.assert_close(tower.eval()(batch), expected)


@pytest.mark.parametrize("modality", ["depth", "imu"])
def test_a_new_tower_is_blind_to_the_level_of_its_input(modality):
    with repeatable(0):
        model = towers.new_model([modality])
        tower = Tower(model, modality)
        tower.spread()
    weight = patch_weight(tower.stem, modality)
    channels = weight.flatten(2) if modality == "depth" else weight.unflatten(1, (6, -1))
    assert channels.mean(dim=-1).abs().max() < 1e-6


def test_weights_of_pixels_are_not_trained_where_cells_stand_in():
    with repeatable(0):
        model = towers.new_model(["depth"])
        tower = Tower(model, "depth")
    trained = {id(parameter) for parameter in tower.parameters_to_train()}
    assert id(patch_weight(tower.stem, "depth")) not in trained
    assert id(tower.cells) in trained
    assert id(model.modality_heads["depth"][2].weight) in trained
