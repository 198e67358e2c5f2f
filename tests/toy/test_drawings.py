import numpy as np
import pytest
from scipy.signal import find_peaks

from chatbind_cli.toy import media
from chatbind_cli.toy.digits import load_items

# ITU-T Q.23, written down again key by key
DTMF = {
    1: (697, 1209), 2: (697, 1336), 3: (697, 1477),
    4: (770, 1209), 5: (770, 1336), 6: (770, 1477),
    7: (852, 1209), 8: (852, 1336), 9: (852, 1477), 0: (941, 1336),
}  # fmt: skip


@pytest.fixture(scope="module")
def scan():
    return load_items()[1][0].scan


def _rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("digit", range(10))
def test_a_tone_is_the_pair_of_frequencies_of_its_key(digit):
    wave = media.tone(digit, _rng(digit)).astype(float)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    hz = np.fft.rfftfreq(len(wave), 1 / 16_000)
    for low, high, wanted in ((600, 1050, DTMF[digit][0]), (1100, 1600, DTMF[digit][1])):
        band = (hz > low) & (hz < high)
        heard = hz[band][spectrum[band].argmax()]
        # 1.5 % off at most, and the presses smear a line over some 4 Hz
        assert heard == pytest.approx(wanted, rel=0.015, abs=8)


@pytest.mark.parametrize("digit", range(10))
def test_a_hand_taps_as_often_as_the_digit_says_and_ten_times_for_zero(digit):
    for seed in range(3):
        movement = media.taps(digit, _rng(seed))
        assert movement.shape == (500, 6)
        up = movement[:, 2] - np.median(movement[:, 2])
        peaks, _ = find_peaks(up, height=4, distance=25)
        assert len(peaks) == (digit or 10)


def test_a_resting_hand_feels_gravity_in_metres_per_second_squared():
    movement = media.taps(1, _rng())
    rest = np.median(movement[:, :3], axis=0)
    assert np.linalg.norm(rest) == pytest.approx(9.81, rel=0.02)


def test_ink_is_dark_in_the_picture_near_in_the_relief_and_warm_in_the_imprint(scan):
    big = media.enlarge(scan, 64) > 0.8
    none = media.enlarge(scan, 64) < 0.05
    picture = media.picture(scan, _rng())
    assert picture[big].mean() < picture[none].mean() - 100
    big, none = media.enlarge(scan, 112) > 0.8, media.enlarge(scan, 112) < 0.05
    relief = media.relief(scan, _rng()).astype(float)
    assert 1300 < relief[none].mean() < 1800  # millimetres
    assert relief[big].mean() < relief[none].mean() * 0.85
    imprint = media.imprint(scan, _rng()).astype(float)
    assert imprint[big].mean() > imprint[none].mean() + 60


def test_the_digit_of_a_film_moves_and_stays_in_view(scan):
    frames = media.film(scan, _rng()).astype(float)
    assert frames.shape == (24, 64, 80)
    ink = (255 - frames).clip(min=60) - 60
    x = (ink.sum(axis=1) * np.arange(80)).sum(axis=1) / ink.sum(axis=(1, 2))
    assert np.ptp(x) > 5
    # the same amount of ink in every frame: nothing is cut off
    totals = ink.sum(axis=(1, 2))
    assert totals.std() < 0.02 * totals.mean()
