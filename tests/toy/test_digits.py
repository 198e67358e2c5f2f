import numpy as np
import pytest

from chatbind_cli.toy.digits import HELDOUT_BLOCK, load_items


def test_no_scan_is_both_trained_on_and_held_out():
    train, heldout = load_items()
    assert len(train) == 1597
    assert len(heldout) == 200
    # two of the 1797 scans may be equal; their places may not
    assert len(train) + len(heldout) == 1797
    from sklearn.datasets import load_digits

    scans = load_digits().images / 16
    together = np.sort(np.stack([item.scan for item in train + heldout]).sum(axis=(1, 2)))
    np.testing.assert_allclose(together, np.sort(scans.sum(axis=(1, 2))), atol=1e-4)


def test_every_held_out_block_has_every_digit_equally_often():
    _, heldout = load_items()
    for start in range(0, 200, HELDOUT_BLOCK):
        digits = [item.digit for item in heldout[start : start + HELDOUT_BLOCK]]
        assert np.bincount(digits).tolist() == [10] * 10


def test_digits_come_in_no_order_that_a_file_number_would_tell():
    _, heldout = load_items()
    digits = np.array([item.digit for item in heldout])
    numbers = np.arange(len(digits))
    # chance agreement is a tenth; 0.2 is four standard deviations above it
    assert max(np.mean((numbers + k) % 10 == digits) for k in range(10)) < 0.2
    assert heldout[7].stem == "heldout-0007"


def test_the_split_is_the_same_every_time():
    first, second = load_items(), load_items()
    assert [i.digit for i in first[0]] == [i.digit for i in second[0]]
    np.testing.assert_array_equal(first[1][5].scan, second[1][5].scan)


def test_scans_run_from_paper_to_ink():
    train, _ = load_items()
    scans = np.stack([item.scan for item in train])
    assert scans.shape == (1597, 8, 8)
    assert scans.min() == 0
    assert scans.max() == pytest.approx(1)
