import math

import pytest
import torch
from torch.nn.functional import normalize

from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.toy.binding import Samples, _pair_loss, bind, embed, train_image_tower
from chatbind_cli.toy.digits import load_items
from chatbind_cli.toy.encoders import class_means, nearest_mean_accuracy
from chatbind_cli.toy.fit import repeatable
from chatbind_cli.toy.imagebind import CONFIG, ImageBindTower, patch_weight, to_cells
from chatbind_cli.toy.media import relative_path, write_media


def _sounds(items, folder):
    write_media(items, "audio", folder, seed=0)
    tensors = [load_media(folder / relative_path(i, "audio"), "audio").tensor for i in items]
    return Samples(torch.stack(tensors), torch.tensor([item.digit for item in items]))


def test_a_bound_modality_lies_where_the_images_of_its_digits_lie(tmp_path):
    train, heldout = load_items()
    sounds, unheard = _sounds(train[:96], tmp_path), _sounds(heldout[:20], tmp_path)
    with repeatable(0) as generator:
        # images as a trained image tower puts them: around ten directions
        centres = normalize(torch.randn(10, 64), dim=-1)
        images = normalize(centres[sounds.digits] + 0.05 * torch.randn(96, 64), dim=-1)
        model = ImageBind(CONFIG, ["audio"])
        means = class_means(images, sounds.digits)
        arguments = {"generator": generator, "report": lambda step, loss: None}
        targets = Samples(images, sounds.digits)
        tower = ImageBindTower(model, "audio")
        bind(tower, "audio", sounds, targets, epochs=14, **arguments)
    with torch.no_grad():
        clips = tower(unheard.tensors.flatten(0, 1)).unflatten(0, (len(unheard), -1))
        embeddings = normalize(clips.mean(dim=1), dim=-1)
    assert nearest_mean_accuracy(embeddings, unheard.digits, means) >= 0.85
    # not only nearest: close, so that there is no gap between the modalities
    assert (embeddings * centres[unheard.digits]).sum(dim=1).mean() > 0.7


def test_the_image_tower_learns_names_and_the_model_holds_what_it_learned():
    with repeatable(0) as generator:
        # ten patterns in place of digits, so that a few steps are enough
        patterns = torch.randn(10, 3, 32, 32)
        digits = torch.arange(10).repeat(15)
        images = Samples(patterns[digits] + 0.1 * torch.randn(150, 3, 32, 32), digits)
        clips = images.tensors[:, None, :, None].expand(-1, 2, -1, 2, -1, -1)
        model = ImageBind(CONFIG, ["image"])
        losses = []
        tower = ImageBindTower(model, "image")
        train_image_tower(
            tower,
            images,
            Samples(clips, digits),
            epochs=20,
            generator=generator,
            report=lambda step, loss: losses.append(loss),
        )
    assert losses[-1] < math.log(10) / 2
    embeddings = embed(tower, images.tensors)
    means = class_means(embeddings, digits)
    assert nearest_mean_accuracy(embeddings, digits, means) > 0.9
    pixels = images.tensors[:3].repeat_interleave(7, -1).repeat_interleave(7, -2)
    with torch.no_grad():
        torch.testing.assert_close(model("image", pixels), embeddings[:3], atol=2e-5, rtol=0)


def test_pairs_that_share_a_digit_do_not_count_as_wrong():
    images = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    digits = torch.tensor([4, 4, 7])
    right = _pair_loss(images, images, digits)
    # by hand: rows 0 and 1 have two right answers at cosine 1, row 2 one
    two = math.log(2 * math.exp(10) + 1) - 10
    one = math.log(math.exp(10) + 2) - 10
    assert float(right) == pytest.approx((2 * two + one) / 3, abs=1e-4)
    swapped = _pair_loss(images[[2, 1, 0]], images, digits)
    assert swapped > right + 1


def test_class_means_and_accuracy_are_those_of_plain_arithmetic():
    embeddings = normalize(torch.randn(40, 5), dim=-1)
    digits = torch.arange(40) % 10
    means = class_means(embeddings, digits)
    mean = embeddings[3::10].mean(dim=0)
    torch.testing.assert_close(means[3], mean / mean.norm())
    right = 0
    for row, digit in zip(embeddings, digits.tolist(), strict=True):
        cosines = [float(row @ centre) for centre in means]
        right += cosines.index(max(cosines)) == digit
    assert nearest_mean_accuracy(embeddings, digits, means) == pytest.approx(right / 40)


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
        model = ImageBind(CONFIG, [modality])
        tower = ImageBindTower(model, modality)
    pixels = torch.rand(2, *shape)
    with torch.no_grad():
        coarse = tower(to_cells(pixels))
        tower.finish()
        full = torch.nn.functional.normalize(model(modality, pixels), dim=-1)
    # sums of thousands of float32 numbers in another order
    torch.testing.assert_close(full, coarse, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("modality", "shape"), [("audio", (1, 128, 204)), ("imu", (6, 2000))])
def test_sounds_and_motion_go_through_the_encoders_own_stem(modality, shape):
    with repeatable(0):
        model = ImageBind(CONFIG, [modality])
        tower = ImageBindTower(model, modality)
    batch = torch.rand(2, *shape)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(modality, batch), dim=-1)
        torch.testing.assert_close(tower.eval()(batch), expected)


@pytest.mark.parametrize("modality", ["depth", "imu"])
def test_a_new_tower_is_blind_to_the_level_of_its_input(modality):
    with repeatable(0):
        model = ImageBind(CONFIG, [modality])
        tower = ImageBindTower(model, modality)
        tower.finish()
    weight = patch_weight(tower.stem, modality)
    channels = weight.flatten(2) if modality == "depth" else weight.unflatten(1, (6, -1))
    assert channels.mean(dim=-1).abs().max() < 1e-6


def test_weights_of_pixels_are_not_trained_where_cells_stand_in():
    with repeatable(0):
        model = ImageBind(CONFIG, ["depth"])
        tower = ImageBindTower(model, "depth")
    trained = {id(parameter) for parameter in tower.parameters_to_train()}
    assert id(patch_weight(tower.stem, "depth")) not in trained
    assert id(tower.cells) in trained
    assert id(model.modality_heads["depth"][2].weight) in trained
