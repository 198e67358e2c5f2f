from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.errors import ChatBindError, MediaError, UsageError
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import open_source
from tests.recordings import image_file, npy

Maker = Callable[..., bytes]
SHAPES = {
    "image": (3, 224, 224),
    "video": (15, 3, 2, 224, 224),
    "audio": (3, 1, 128, 204),
    "depth": (1, 224, 224),
    "thermal": (1, 224, 224),
    "imu": (6, 2000),
}
COLOURS = np.arange(30 * 40 * 3).reshape(30, 40, 3).astype(np.uint8)


def parquet() -> bytes:
    buffer = io.BytesIO()
    names = ["ax", "ay", "az", "gx", "gy", "gz"]
    pyarrow.parquet.write_table(pa.table(dict.fromkeys(names, pa.array(np.ones(2000)))), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def samples(film: Maker, sound: Maker) -> dict[str, tuple[str, bytes]]:
    """name -> (modality by content, bytes)"""
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in (0, 128, 255)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:], duration=100)
    csv = b"timestamp,ax,ay,az,gx,gy,gz\n" + b"".join(
        b"%.3f,1,2,3,4,5,6\n" % (i / 100) for i in range(300)
    )
    grey16 = np.full((30, 40), 1500, np.uint16)
    return {
        **{
            kind.lower(): ("image", image_file(COLOURS, kind))
            for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")
        },
        "grey png": ("image", image_file(np.zeros((30, 40), np.uint8))),
        "depth png": ("depth", image_file(grey16)),
        "depth tiff": ("depth", image_file(grey16, "TIFF")),
        "float tiff": ("depth", image_file(np.ones((30, 40), np.float32), "TIFF")),
        "depth npy": ("depth", npy(np.ones((30, 40), np.float32))),
        "imu npy": ("imu", npy(np.ones((6, 2000)))),
        "imu npy upright": ("imu", npy(np.ones((2000, 6)))),
        "parquet": ("imu", parquet()),
        "csv": ("imu", csv),
        "csv without header": ("imu", csv.split(b"\n", 1)[1]),
        "animation": ("video", animation.getvalue()),
        "mp4": ("video", film(frames=5)),
        "mov": ("video", film("mov", frames=5)),
        "webm": ("video", film("webm", "libvpx-vp9", frames=5)),
        "mkv": ("video", film("matroska", frames=5)),
        "avi": ("video", film("avi", "mjpeg", frames=5, pixels="yuvj420p")),
        "ts": ("video", film("mpegts", "mpeg2video", frames=30, rate=25)),
        "mpg": ("video", film("mpeg", "mpeg2video", frames=30, rate=25)),
        "wav": ("audio", sound(seconds=0.5)),
        "flac": ("audio", sound("flac", "flac", seconds=0.5)),
        "mp3": ("audio", sound("mp3", "libmp3lame", seconds=0.5)),
        "opus": ("audio", sound("ogg", "libopus", rate=48_000, seconds=0.5)),
        "weba": ("audio", sound("webm", "libopus", rate=48_000, seconds=0.5)),
        "m4a": ("audio", sound("ipod", "aac", seconds=0.5)),
        "aac": ("audio", sound("adts", "aac", seconds=0.5)),
        "aiff": ("audio", sound("aiff", "pcm_s16be", seconds=0.5)),
        "ac3": ("audio", sound("ac3", "ac3", seconds=0.5)),
    }


def test_every_format_is_told_by_content_and_loads(
    samples: dict[str, tuple[str, bytes]],
) -> None:
    for name, (modality, data) in samples.items():
        media = load_media(data)
        assert media.modality == modality, name
        assert tuple(media.tensor.shape) == SHAPES[modality], name
        assert media.tensor.dtype == torch.float32 and media.tensor.isfinite().all(), name


def test_the_name_of_a_file_does_not_matter(
    samples: dict[str, tuple[str, bytes]], tmp_path: Path
) -> None:
    for name in ("mp3", "png", "mp4", "csv", "depth npy"):
        modality, data = samples[name]
        path = tmp_path / "wrong.xyz.jpg"
        path.write_bytes(data)
        assert sniff(open_source(path)) == modality
    # a mislabelled file asked for by its wrong modality is one line
    path.write_bytes(samples["mp3"][1])
    with pytest.raises(MediaError, match="is not a picture"):
        load_media(path, "image")


def test_a_song_with_a_cover_is_audio(sound: Maker) -> None:
    song = sound("mp3", "libmp3lame", seconds=0.5)
    cover = image_file(COLOURS, "JPEG")
    body = b"\0image/jpeg\0\x03\0" + cover
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = len(frame)
    tag = b"ID3\x03\0\0" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0)) + frame
    at = 0 if not song.startswith(b"ID3") else 10 + int.from_bytes(song[6:10], "big")
    media = load_media(tag + song[at:])
    assert media.modality == "audio"
    with pytest.raises(MediaError, match="holds no video"):
        load_media(tag + song[at:], "video")


def test_bytes_paths_streams_and_data_uris_give_one_tensor(
    samples: dict[str, tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jpeg", "mp4", "flac", "depth png", "imu npy", "csv"):
        data = samples[name][1]
        path = tmp_path / "file"
        path.write_bytes(data)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
        tensors = [load_media(ref).tensor for ref in (data, path, str(path), "-", uri)]
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"%PDF-1.7 ...", "is a PDF document"),
        (b"PK\x03\x04....", "is a ZIP archive"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b'  {"image": "x.jpg"}', "is JSON"),
        (b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", "is a playlist"),
        (b"Call me Ishmael. Some years ago, never mind how long, precisely,", "of no kind"),
        (bytes(1000), "of no kind"),
        (bytes(range(256)) * 20, "of no kind"),
        (b"\x93NUMPY\x01\x00", "not a readable NPY"),
        (npy(np.ones((3, 4, 5))), "neither a depth map"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "cannot be decoded|holds neither|no sound|cut short"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "cannot be decoded|holds neither"),
    ],
)
def test_what_is_no_media_file_is_one_line(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=what) as caught:
        load_media(data)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_told_can_be_said() -> None:
    with pytest.raises(MediaError, match="say it with --image, --video, --audio, --depth"):
        load_media(b"\x01\x02\x03")
    thermal = load_media(image_file(np.full((9, 9), 255, np.uint8)), "thermal")
    assert thermal.modality == "thermal" and thermal.tensor.min() == 1
    with pytest.raises(UsageError, match="'smell' is not a modality"):
        load_media(b"\x01", "smell")


def test_every_broken_file_is_a_tensor_or_one_line_but_never_a_crash(
    samples: dict[str, tuple[str, bytes]],
) -> None:
    rng = np.random.default_rng(7)
    options = MediaOptions(video_clips=1, audio_clips=1, max_pixels=100_000)
    for name, (modality, data) in samples.items():
        variants = [data[:cut] for cut in (1, 4, 13, len(data) // 3)]
        for _ in range(4):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 600), 4):
                broken[at] = rng.integers(0, 256)
            variants.append(bytes(broken))
        variants.append(data[: len(data) // 2] + rng.bytes(200) + data[len(data) // 2 :])
        for variant in variants:
            for asked in (None, modality):
                try:
                    tensor = load_media(variant, asked, options).tensor
                except MediaError as error:
                    assert "\n" not in str(error), name
                else:
                    assert tensor.isfinite().all(), name


def test_every_modality_has_a_loader_that_refuses_the_others_in_one_line(
    samples: dict[str, tuple[str, bytes]],
) -> None:
    for modality in MODALITIES:
        for name in ("wav", "csv", "jpeg", "mp4"):
            if samples[name][0] == modality or (modality, name) in {
                ("thermal", "jpeg"),
                ("video", "jpeg"),
            }:
                continue
            with pytest.raises(MediaError) as caught:
                load_media(samples[name][1], modality)
            assert "\n" not in str(caught.value)


def test_a_picture_waits_for_no_other_library_and_threads_may_import_together() -> None:
    program = """
import io, sys, threading
from PIL import Image
from chatbind_cli.errors import MediaError
from chatbind_cli.encoders.imagebind.preprocess import load_media

buffer = io.BytesIO()
Image.new("RGB", (9, 9)).save(buffer, "PNG")
load_media(buffer.getvalue())
print([name for name in ("torchaudio", "av", "pyarrow", "httpx", "timm") if name in sys.modules])
failed = []

def read(modality):
    try:
        load_media(b"RIFFxxxxWAVE", modality)
    except MediaError:
        pass
    except Exception as error:
        failed.append(repr(error))

threads = [threading.Thread(target=read, args=(name,)) for name in (None, "video", "audio")]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(failed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n", done.stderr


def test_whatever_a_library_raises_is_one_line_and_names_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(image_file(COLOURS))
    for error in (RecursionError("deep"), MemoryError(), ZeroDivisionError("a / 0"), KeyError(3)):

        def fail(*_: object, error: Exception = error) -> torch.Tensor:
            raise error

        monkeypatch.setattr("chatbind_cli.encoders.imagebind.vision.load_image", fail)
        with pytest.raises(ChatBindError, match=type(error).__name__) as caught:
            load_media(path)
        assert str(caught.value).startswith(f"{path}: cannot be used")


def test_no_tensor_that_is_not_finite_comes_out(sound: Maker) -> None:
    with np.errstate(over="ignore"):
        loud = np.where(np.arange(44_100) % 2, 1e30, -1e30).astype(np.float32)
    data = sound("wav", "pcm_f32le", samples=loud)
    with pytest.raises(MediaError, match=r"NaN or infinity"):
        load_media(data)


def test_eight_threads_read_large_and_small_media_at_once(
    samples: dict[str, tuple[str, bytes]],
) -> None:
    large = image_file(np.zeros((5000, 5000, 3), np.uint8), compress_level=1)
    todo = [data for _, data in samples.values()] + [large] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: load_media(data).modality, todo, timeout=120))
    assert found == [modality for modality, _ in samples.values()] + ["image"] * 4
