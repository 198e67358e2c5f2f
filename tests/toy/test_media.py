import numpy as np
import pytest
from PIL import Image

from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import open_source
from chatbind_cli.toy.digits import load_items
from chatbind_cli.toy.media import SUFFIXES, relative_path, write_media

SHAPES = {
    "image": (3, 224, 224),
    "video": (15, 3, 2, 224, 224),
    "audio": (3, 1, 128, 204),
    "depth": (1, 224, 224),
    "thermal": (1, 224, 224),
    "imu": (6, 2000),
}


@pytest.fixture(scope="module")
def item():
    return load_items()[1][3]


@pytest.mark.parametrize("modality", SUFFIXES)
def test_the_loaders_read_what_is_written(modality, item, tmp_path):
    write_media([item], modality, tmp_path, seed=0)
    medium = load_media(tmp_path / relative_path(item, modality), modality)
    assert tuple(medium.tensor.shape) == SHAPES[modality]


@pytest.mark.parametrize("modality", SUFFIXES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(modality, item, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_media([item], modality, tmp_path / name, seed=seed)
    first, again, other = (
        (tmp_path / name / relative_path(item, modality)).read_bytes() for name in "abc"
    )
    assert first == again
    assert first != other


def test_a_film_has_the_same_bytes_however_often_it_is_made(item, tmp_path):
    # x264's assembly, left on, gives other bytes in about one of ten
    films = set()
    for _ in range(40):
        write_media([item], "video", tmp_path, seed=0)
        films.add((tmp_path / relative_path(item, "video")).read_bytes())
    assert len(films) == 1


@pytest.mark.parametrize("modality", ["image", "video", "audio", "depth", "imu"])
def test_a_file_tells_its_modality_by_its_content(modality, item, tmp_path):
    write_media([item], modality, tmp_path, seed=0)
    assert sniff(open_source(tmp_path / relative_path(item, modality))) == modality


def test_a_training_item_of_the_same_number_is_another_recording(item, tmp_path):
    train = load_items()[0][item.number]
    write_media([item, train], "audio", tmp_path, seed=0)
    files = [tmp_path / relative_path(x, "audio") for x in (item, train)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_depth_is_stored_in_millimetres_of_sixteen_bits(item, tmp_path):
    write_media([item], "depth", tmp_path, seed=0)
    stored = np.asarray(Image.open(tmp_path / relative_path(item, "depth")))
    assert stored.dtype == np.uint16
    assert 800 < stored.min() < stored.max() < 2000


def test_files_are_counted(item, tmp_path):
    counted = []
    write_media([item], "image", tmp_path, seed=0, count=lambda: counted.append(1))
    assert counted == [1]
