from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from chatbind_cli.encoders.imagebind.audio import load_audio
from chatbind_cli.encoders.imagebind.clips import spread_clips
from chatbind_cli.errors import MediaError
from chatbind_cli.media import audio, container
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source

Maker = Callable[..., bytes]
NAMES = ("dog", "car", "bird")
PADDING = (0 + 4.268) / 9.138


def load(data: bytes | Path, **options: object) -> torch.Tensor:
    return load_audio(open_source(data), MediaOptions(**options))  # type: ignore[arg-type]


def golden_files(golden: Path, shared_data: Path, name: str) -> tuple[list[Path], int]:
    if name == "audio_mono_16k_1s":
        return [golden / "preprocess/media/mono_16k_1s.wav"], 3
    if name == "audio_dog_5clips":
        return [shared_data / "media/dog_audio.wav"], 5
    return [shared_data / f"media/{n}_audio.wav" for n in NAMES], 3


@pytest.mark.parametrize("name", ["audio_dog_car_bird", "audio_dog_5clips", "audio_mono_16k_1s"])
@pytest.mark.parametrize(("summary", "sampler"), [("pin", "imagebind"), ("pypi", "chatbind")])
def test_sound_equals_the_reference(
    golden: Path, shared_data: Path, name: str, summary: str, sampler: str
) -> None:
    files, clips = golden_files(golden, shared_data, name)
    ours = torch.stack([load(f, audio_clips=clips, clip_sampler=sampler) for f in files]).numpy()
    expected = json.loads((golden / f"preprocess/summary_{summary}.json").read_text())[name]
    assert list(ours.shape) == expected["shape"]
    sampled = ours.reshape(-1)[expected["flat_index"]]
    # the golden README: float32 filter banks differ by up to 6e-4 from float64; measured 4e-5
    assert np.abs(sampled - expected["value"]).max() <= 2e-4
    assert abs(float(ours.mean()) - expected["mean"]) < 1e-5
    part = "synth" if "mono" in name else "assets"
    stored = np.load(golden / f"preprocess/audio_{part}_{summary}.npz")[name].astype(np.float32)
    # storage in float16, and the step that the reference's removal of the mean in place leaves
    # where clips overlap; the next test takes that step away
    assert np.abs(ours - stored).max() <= 0.02
    assert np.quantile(np.abs(ours - stored), 0.999) <= 1e-3


def test_only_the_means_removed_in_place_keep_us_from_the_reference(
    golden: Path, shared_data: Path
) -> None:
    stored = np.load(golden / "preprocess/audio_assets_pin.npz")["audio_dog_5clips"][0]
    opened = open_source(shared_data / "media/dog_audio.wav")
    whole = audio.read_stretches(opened, 16_000, lambda total: [(0, total)], longest_s=2.0)[0][None]
    # the reference works on both channels of one array; the second only matters for the mean, and
    # the filter bank removes every window's mean anyway: what stays is the step at the border
    clips = []
    for start, end in spread_clips(whole.shape[1] / 16_000, count=5, seconds=2.0):
        clip = whole[:, int(start * 16_000) : int(end * 16_000)]
        clip -= clip.mean()
        clips.append(_reference_mel(clip))
    emulated = torch.stack(clips).numpy()
    assert np.abs(emulated - stored).max() <= 2.5e-3


def _reference_mel(clip: torch.Tensor) -> torch.Tensor:
    bank = kaldi.fbank(
        clip,
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_length=25,
        frame_shift=10,
    ).T
    return (torch.nn.functional.pad(bank, (0, 204 - bank.shape[1]))[None] + 4.268) / 9.138


@pytest.mark.parametrize(
    ("box", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 44_100),
        ("wav", "pcm_s24le", 48_000),
        ("wav", "pcm_f32le", 22_050),
        ("wav", "pcm_u8", 8_000),
        ("flac", "flac", 44_100),
        ("mp3", "libmp3lame", 44_100),
        ("ogg", "libopus", 48_000),
        ("webm", "libopus", 48_000),
        ("ipod", "aac", 44_100),
        ("adts", "aac", 44_100),
        ("aiff", "pcm_s16be", 44_100),
        ("matroska", "flac", 44_100),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_sounds_the_same(
    sound: Maker, box: str, codec: str, rate: int, channels: int
) -> None:
    reference = load(sound(seconds=3, rate=rate))
    found = load(sound(box, codec, seconds=3, rate=rate, channels=channels))
    assert found.shape == (3, 1, 128, 204)
    # lossy codecs change the quiet bins; the tone itself must stay where it is. Encoder delay that
    # a container does not state moves the clips by up to 50 ms
    assert (found - reference).abs().median() < 0.06


def test_silence_and_a_steady_offset_sound_alike(sound: Maker) -> None:
    silent = load(sound(samples=np.zeros(48_000), rate=16_000))
    offset = load(sound(samples=np.full(48_000, 0.5), rate=16_000))
    torch.testing.assert_close(silent, offset)


def test_the_first_channel_is_heard(sound: Maker) -> None:
    left = np.sin(np.arange(48_000) * 0.1) * 0.5
    data = bytearray(sound(samples=left, rate=16_000, channels=2))
    at = data.index(b"data") + 8
    pcm = np.frombuffer(bytes(data[at:]), "<i2").copy()
    pcm[1::2] = 0  # silence the right channel
    stereo = bytes(data[:at]) + pcm.tobytes()
    torch.testing.assert_close(load(stereo), load(sound(samples=left, rate=16_000)))


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 98), (0.5, 48), (0.03, 1), (0.001, 1)])
def test_short_sounds_are_padded_after_their_end(sound: Maker, seconds: float, steps: int) -> None:
    tensor = load(sound(seconds=seconds, rate=16_000))
    assert tensor.shape == (3, 1, 128, 204)
    assert torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[0], tensor[2])
    torch.testing.assert_close(tensor[..., steps:], torch.full_like(tensor[..., steps:], PADDING))
    assert (tensor[..., :steps] - PADDING).abs().max() > 0.01


@pytest.mark.parametrize(
    ("box", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 44_100),
        ("wav", "pcm_s16le", 48_000),
        ("wav", "pcm_s16le", 22_050),
        ("wav", "pcm_s16le", 8_000),
        ("wav", "pcm_s16le", 11_025),
        ("wav", "pcm_s16le", 44_099),
        ("flac", "flac", 44_100),
        ("mp3", "libmp3lame", 44_100),
    ],
)
def test_a_long_sound_gives_the_same_clips_as_one_decoded_whole(
    sound: Maker, monkeypatch: pytest.MonkeyPatch, box: str, codec: str, rate: int
) -> None:
    data = sound(box, codec, seconds=12, rate=rate)
    whole = load(data)
    monkeypatch.setattr(audio, "_WHOLE_SECONDS", 1)
    # float32 convolutions of other lengths round differently; near-silent bins show it most
    # (measured: 0 but for 8 kHz, whose upper half is silent, 2.4e-3)
    torch.testing.assert_close(load(data), whole, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("box", "codec"), [("ogg", "libopus"), ("webm", "libopus"), ("ipod", "aac"), ("mpegts", "aac")]
)
def test_lossy_long_sounds_are_cut_at_the_right_moment(
    sound: Maker, monkeypatch: pytest.MonkeyPatch, box: str, codec: str
) -> None:
    # a click every second: a clip cut elsewhere would show it at another step
    samples = np.zeros(12 * 48_000)
    for second in range(12):
        samples[second * 48_000 + 24_000 :][:480] = np.sin(np.arange(480) * 0.5)
    data = sound(box, codec, samples=samples, rate=48_000)
    whole = load(data, audio_clips=4)
    monkeypatch.setattr(audio, "_WHOLE_SECONDS", 1)
    found = load(data, audio_clips=4)
    for a, b in zip(whole, found, strict=True):
        loudest = [int(x[0, :, :196].mean(dim=0).argmax()) for x in (a, b)]
        assert abs(loudest[0] - loudest[1]) <= 3 or abs(abs(loudest[0] - loudest[1]) - 100) <= 3


def test_of_a_long_sound_only_the_clips_are_decoded(
    sound: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sound("flac", "flac", samples=np.zeros(600 * 8_000), rate=8_000)
    count = 0
    real = container.decoded

    def counted(*args: object) -> object:
        nonlocal count
        for frame in real(*args):  # type: ignore[arg-type]
            count += frame.samples
            yield frame

    monkeypatch.setattr(audio, "decoded", counted)
    assert load(data).shape == (3, 1, 128, 204)
    assert count < 20 * 8_000


def test_the_sound_of_a_video_is_heard(tmp_path: Path) -> None:
    import av

    path = tmp_path / "talk.mp4"
    with av.open(path, "w") as output:
        pictures = output.add_stream("libx264", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        voice = output.add_stream("aac", rate=16_000)
        voice.codec_context.layout = "mono"
        for _ in range(30):
            grey = np.zeros((48, 64, 3), np.uint8)
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        tone = np.sin(np.arange(48_000) * 0.2)[None].astype(np.float32)
        for i in range(0, 47_104, 1024):
            frame = av.AudioFrame.from_ndarray(tone[:, i : i + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, i
            output.mux(voice.encode(frame))
        output.mux(pictures.encode(None))
        output.mux(voice.encode(None))
    tensor = load(path)
    loudest = tensor[0, 0, :, 50:150].mean(dim=1).argmax()
    # 0.2 radians a sample at 16 kHz are 509 Hz; HTK's mel scale from 20 Hz to 8 kHz in 128 bins
    mel = [2595 * np.log10(1 + hertz / 700) for hertz in (20, 509, 8_000)]
    assert abs(int(loudest) - 129 * (mel[1] - mel[0]) / (mel[2] - mel[0])) < 2


def test_a_film_without_sound_says_so(film: Maker) -> None:
    with pytest.raises(MediaError, match="holds no sound"):
        load(film(frames=3))


@pytest.mark.parametrize(
    ("box", "codec"),
    [("wav", "pcm_s16le"), ("aiff", "pcm_s16be"), ("flac", "flac"), ("matroska", "flac"),
     ("webm", "libopus"), ("ipod", "aac")],
)  # fmt: skip
def test_a_truncated_sound_is_refused(sound: Maker, box: str, codec: str) -> None:
    data = sound(box, codec, rate=48_000)
    with pytest.raises(MediaError) as caught:
        load(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


def test_a_wav_written_to_a_pipe_has_no_length_and_is_read(sound: Maker) -> None:
    data = bytearray(sound(rate=16_000))
    plain = load(bytes(data))
    data[4:8] = b"\xff\xff\xff\xff"
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    torch.testing.assert_close(load(bytes(data)), plain)


@pytest.mark.parametrize("rate", [1, 999, 1_000_000, 2**31 - 1])
def test_an_absurd_sampling_rate_is_refused(sound: Maker, rate: int) -> None:
    data = bytearray(sound(rate=16_000))
    at = data.index(b"fmt ") + 12
    data[at : at + 4] = rate.to_bytes(4, "little")
    data[at + 4 : at + 8] = min(rate * 2, 2**32 - 1).to_bytes(4, "little")
    with pytest.raises(MediaError, match="samples per second|cannot be decoded|no sound"):
        load(bytes(data))


@pytest.mark.parametrize(
    "data", [b"RIFF", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"ID3" + bytes(9)]
)
def test_a_bare_header_is_one_line(data: bytes) -> None:
    with pytest.raises(MediaError):
        load(data)


def test_options_change_the_number_and_length_of_clips(sound: Maker) -> None:
    options = MediaOptions(audio_clips=2, clip_seconds=1.0)
    tensor = load_audio(open_source(sound(rate=16_000)), options)
    assert tensor.shape == (2, 1, 128, 204)
    torch.testing.assert_close(tensor[..., 98:], torch.full_like(tensor[..., 98:], PADDING))
    longer = load_audio(open_source(sound(rate=16_000)), replace(options, clip_seconds=3.0))
    assert longer.shape == (2, 1, 128, 204)


def wav(values: np.ndarray, *, kind: int = 3, channels: int = 1, rate: int = 44_100) -> bytes:
    """A WAV file as a program may write it: `kind` 1 holds whole numbers, 3 floating-point ones."""
    width = values.dtype.itemsize * channels
    form = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * width, width, 8 * values.dtype.itemsize
    )
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data"
    body += struct.pack("<I", values.nbytes) + values.tobytes()
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_one_sample_that_is_no_number_is_an_error(bad: float) -> None:
    values = np.zeros(44_100)
    assert load(wav(values)).isfinite().all()
    values[20_000] = bad  # as one flipped bit makes it; float32 cannot hold 1e300
    with pytest.raises(MediaError, match="no numbers"):
        load(wav(values))
    if not np.isfinite(bad):
        with pytest.raises(MediaError, match="no numbers"):
            load(wav(values.astype(np.float32)))


def test_a_kind_of_sample_that_is_not_read_is_named() -> None:
    with pytest.raises(MediaError, match="samples of the kind s64, which is not read"):
        load(wav(np.zeros(44_100, np.int64), kind=1))


def test_a_microphone_array_gives_its_first_channel_and_a_thousand_are_refused() -> None:
    tone = np.zeros((8_000, 200), np.int16)
    tone[:, 0] = 10_000 * np.sin(np.arange(8_000) / 9)
    alone = load(wav(tone[:, 0].copy(), kind=1))
    torch.testing.assert_close(load(wav(tone, kind=1, channels=200)), alone)
    with pytest.raises(MediaError):
        load(wav(np.zeros((100, 1024), np.int16), kind=1, channels=1024))


def test_a_sound_shorter_than_a_window_is_one_with_silence_after_it() -> None:
    few = np.random.default_rng(0).standard_normal(200).astype(np.float32) / 8
    padded = np.concatenate([few, np.zeros(200, np.float32)])
    assert torch.equal(load(wav(few, rate=16_000)), load(wav(padded, rate=16_000)))
    assert (load(wav(few, rate=16_000))[0, 0, :, 1:] - PADDING).abs().max() < 1e-6
