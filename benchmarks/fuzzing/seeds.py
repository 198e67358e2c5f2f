"""Good files of every format that is read: what `fuzz.py` makes its mutants from.

The same seed gives the same files, with the libraries that are installed. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chatbind_cli.cli import run
from tests.encoders.languagebind.repositories import save_repository
from tests.inference.world import World, make_world
from tests.recordings import _film as film
from tests.recordings import _sound as sound

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

MODALITY = {
    **dict.fromkeys(("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "ppm", "jp2"), "image"),
    **dict.fromkeys(("wav", "aiff", "flac", "mp3", "ogg", "opus", "aac", "m4a"), "audio"),
    **dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov", "ts", "film-gif"), "video"),
    **dict.fromkeys(("depth-png", "depth-npy", "depth-tiff"), "depth"),
    **dict.fromkeys(("thermal-png", "thermal-tiff"), "thermal"),
    **dict.fromkeys(("imu-csv", "imu-npy", "imu-parquet"), "imu"),
}
"""Every format of media, and what it is read as."""


def suffix(kind: str) -> str:
    """The usual ending of a format's file names."""
    return "." + kind.rpartition("-")[2]


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk with its length and check sum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(draw: np.random.Generator, size: int, bits: int, colour: int, interlaced: bool) -> bytes:
    """Kinds of PNG that Pillow does not write: 16 bits a channel, few bits, interlaced."""
    rows = []
    for x, y, step_x, step_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        width = len(range(x, size, step_x))
        count = (width * bits * _PNG_CHANNELS[colour] + 7) // 8
        rows += [b"\0" + draw.bytes(count) for _ in range(y, size, step_y) if width]
    header = struct.pack(">IIBBBBB", size, size, bits, colour, 0, 0, interlaced)
    palette = png_chunk(b"PLTE", draw.bytes(3 << bits)) if colour == 3 else b""
    data = png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + palette + data + png_chunk(b"IEND", b"")
    )


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _pictures(draw: np.random.Generator) -> dict[str, list[bytes]]:
    colours = Image.fromarray(draw.integers(0, 256, (40, 52, 3), dtype=np.uint8))
    grey, alpha = colours.convert("L"), colours.convert("RGBA")
    smooth = Image.linear_gradient("L").resize((60, 44)).convert("RGB")
    more = [smooth, colours.resize((60, 44)), smooth.rotate(90, expand=False)]
    frames: dict[str, Any] = {"save_all": True, "append_images": more, "duration": 40}
    deep = Image.fromarray(draw.integers(300, 9000, (30, 36), dtype=np.uint16))
    metres = Image.fromarray(draw.uniform(0.3, 9, (30, 36)).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": [saved(colours, "JPEG"), saved(smooth, "JPEG", progressive=True, exif=exif),
                 saved(grey, "JPEG"), saved(colours.convert("CMYK"), "JPEG")],
        "png": [saved(colours, "PNG"), saved(alpha, "PNG"), saved(colours.quantize(16), "PNG"),
                saved(grey.convert("1"), "PNG"), *(_png(draw, 24, bits, colour, lace) for
                bits, colour, lace in ((16, 2, False), (8, 6, True), (4, 3, True), (16, 4, True)))],
        "webp": [saved(colours, "WEBP"), saved(alpha, "WEBP", lossless=True),
                 saved(smooth, "WEBP", **frames)],
        "gif": [saved(colours, "GIF"), saved(smooth, "GIF", transparency=3)],
        "film-gif": [saved(smooth, "GIF", **frames), saved(colours, "GIF", loop=0, **frames)],
        "bmp": [saved(colours, "BMP"), saved(grey, "BMP"), saved(alpha, "BMP"),
                saved(colours.quantize(16), "BMP")],
        "tiff": [saved(colours, "TIFF"), saved(colours, "TIFF", compression="tiff_lzw"),
                 saved(alpha, "TIFF", compression="tiff_adobe_deflate"), _tiles(draw),
                 saved(smooth, "TIFF", compression="jpeg"), saved(grey, "TIFF", big_tiff=True)],
        "avif": [saved(smooth, "AVIF"), saved(alpha, "AVIF"), saved(smooth, "AVIF", **frames)],
        "ppm": [saved(colours, "PPM"), saved(grey, "PPM"), saved(grey.convert("1"), "PPM"),
                b"P3\n2 2\n255\n" + b"9 8 7 " * 4],
        "jp2": [saved(colours, "JPEG2000"), saved(grey, "JPEG2000", no_jp2=True)],
        "depth-png": [saved(deep, "PNG"), _png(draw, 30, 16, 0, False)],
        "depth-npy": [_npy(draw.uniform(0.3, 9, (30, 36)).astype(kind)) for kind in
                      ("<f4", ">f8", "<u2", "<f2")] + [_npy(np.asfortranarray(np.ones((9, 8))))],
        "depth-tiff": [saved(metres, "TIFF"), saved(deep, "TIFF"),
                       saved(metres, "TIFF", compression="tiff_lzw")],
        "thermal-png": [saved(grey, "PNG"), saved(deep, "PNG"), saved(colours, "PNG")],
        "thermal-tiff": [saved(grey, "TIFF"), saved(metres, "TIFF"), saved(deep, "TIFF")],
    }  # fmt: skip


def _tiles(draw: np.random.Generator) -> bytes:
    """A TIFF of four deflated tiles, little endian; Pillow writes strips alone."""
    tiles = [zlib.compress(draw.bytes(16 * 16)) for _ in range(4)]
    starts = [8 + sum(map(len, tiles[:i])) for i in range(4)]
    extra = 8 + sum(map(len, tiles))
    tags = [(256, 4, 1, 32), (257, 4, 1, 32), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
            (277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 4, extra),
            (325, 4, 4, extra + 16)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    lists = struct.pack("<8I", *starts, *map(len, tiles))
    head = b"II*\0" + struct.pack("<I", extra + 32)
    return head + b"".join(tiles) + lists + directory + bytes(4)


def _sounds(draw: np.random.Generator) -> dict[str, list[bytes]]:
    def make(container: str, codec: str, **options: Any) -> bytes:
        return sound(container, codec, **{"seconds": 0.8, "rate": 16_000, **options})

    noise = draw.normal(0, 0.2, 12_000)
    return {
        "wav": [make("wav", f"pcm_{kind}") for kind in ("u8", "s16le", "s24le", "s32le", "f32le")]
        + [make("wav", "pcm_f64le", samples=noise), make("wav", "pcm_s64le", channels=2),
           make("wav", "adpcm_ms"), make("wav", "pcm_alaw", rate=8_000)],
        "aiff": [make("aiff", "pcm_s16be"), make("aiff", "pcm_s24be", channels=2)],
        "flac": [make("flac", "flac"), make("flac", "flac", samples=noise, channels=2)],
        "mp3": [make("mp3", "libmp3lame"), make("mp3", "libmp3lame", rate=44_100, channels=2)],
        "ogg": [make("ogg", "flac"), make("ogg", "libopus", rate=48_000, channels=2)],
        "opus": [make("ogg", "libopus", rate=48_000), make("webm", "libopus", rate=48_000)],
        "aac": [make("adts", "aac")],
        "m4a": [make("ipod", "aac"), make("mov", "pcm_s16le"), make("mp4", "alac")],
    }  # fmt: skip


def _films(draw: np.random.Generator) -> dict[str, list[bytes]]:
    def make(container: str, codec: str, **options: Any) -> bytes:
        return film(container, codec, frames=24, size=(48, 32), gop=6, **options)

    noise = draw.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return {
        "mp4": [make("mp4", "libx264"), make("mp4", "mpeg4", draw=lambda i: noise * np.uint8(i))],
        "webm": [make("webm", "libvpx-vp9"), make("webm", "libvpx")],
        "mkv": [make("matroska", "libvpx-vp9"), make("matroska", "mpeg4"),
                make("matroska", "ffv1")],
        "avi": [make("avi", "mpeg4"), make("avi", "mjpeg", pixels="yuvj420p"),
                make("avi", "rawvideo", pixels="yuv420p")],
        "mov": [make("mov", "libx264"), make("mov", "mjpeg", pixels="yuvj420p"),
                make("mov", "qtrle", pixels="rgb24")],
        "ts": [make("mpegts", "libx264"), make("mpegts", "mpeg2video")],
    }  # fmt: skip


def _motions(draw: np.random.Generator) -> dict[str, list[bytes]]:
    names = ("timestamp", "acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
    table = np.column_stack([np.arange(300) / 100, draw.normal(0, 1, (300, 6))])

    def text(mark: str, header: bool, columns: int) -> bytes:
        rows = [mark.join(f"{cell:.4f}" for cell in row[-columns:]) for row in table]
        return "\n".join([mark.join(names[-columns:])] * header + rows).encode()

    def parquet(**options: Any) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table(dict(zip(names, table.T, strict=True))), buffer, **options)
        return buffer.getvalue()

    window = draw.normal(0, 1, (6, 2000))
    return {
        "imu-csv": [text(",", True, 7), text(";", True, 7), text("\t", False, 7),
                    text(" ", False, 7),
                    text(",", True, 7).replace(b"\n", b"\r\n")],
        "imu-npy": [_npy(window), _npy(window.T.astype("<f4")), _npy(window.astype(">i2"))],
        "imu-parquet": [parquet(), parquet(compression="zstd"), parquet(use_dictionary=False)],
    }  # fmt: skip


def media_seeds(seed: int) -> dict[str, list[bytes]]:
    """Good files of every format of media."""
    draw = np.random.default_rng(seed)
    return {**_pictures(draw), **_sounds(draw), **_films(draw), **_motions(draw)}


def record_seeds() -> dict[str, list[list[Any]]]:
    """Records of every kind, as lists of JSON values."""
    media = [("image", "0.png"), ("audio", "tone.wav"), ("depth", "depth.png"), ("image", "2.png")]
    words = ["Which colour is it?", "What is heard here?", "How far is it?", "Is it red?"]
    questions, answers, others, talks, lists = [], [], [], [], []
    for number, ((kind, name), text) in enumerate(zip(media, words, strict=True)):
        key = {"question_id": f"q{number}", "category": ("conv", "detail")[number % 2]}
        questions.append({**key, kind: name, "text": text, "answer": "It is brown."})
        reply = {**key, "prompt": text, "metadata": {}, "answer_id": f"a{number}"}
        answers.append({**reply, "text": "It is brown.", "model_id": "first"})
        others.append({**reply, "text": "A dog, not a car.", "model_id": "second"})
        said = [{"from": "human", "value": f"<{kind}>\n{text}"}, {"from": "gpt", "value": "Brown."}]
        talks.append({"id": f"t{number}", kind: name, "conversations": said})
        lists.append({"path": name, "modality": kind, "id": number})
    contexts = [{"id": f"c{n}", kind: name, "captions": ["A dog."], "instances":
                 [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
                for n, (kind, name) in enumerate(media)]  # fmt: skip
    return {"questions": questions, "answers": answers, "others": others, "conversations": talks,
            "lists": lists, "contexts": contexts}  # fmt: skip


def packed(text: bytes) -> dict[str, bytes]:
    """The same file compressed, which the readers of records undo."""
    return {"gz": gzip.compress(text, mtime=0), "zst": zstandard.compress(text)}


def make_models(folder: Path) -> World:
    """Encoder, language model, ChatBind model and every kind of weights file that is read."""
    world = make_world(folder)
    llama = AutoModelForCausalLM.from_pretrained(world.llama, trust_remote_code=False)
    llama.save_pretrained(folder / "shards", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.llama / name, folder / "shards" / name)
    weights = load_file(world.llama / "model.safetensors")
    for name, zipped in (("bin", True), ("old-bin", False)):
        shutil.copytree(world.llama, folder / name, ignore=lambda *_: ["model.safetensors"])
        torch.save(
            weights, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
        )
    weights = load_file(world.encoder / "imagebind.safetensors")
    for name, zipped in (("pth", True), ("old-pth", False)):
        (folder / name).mkdir()
        shutil.copy(world.encoder / "config.json", folder / name)
        torch.save(weights, folder / name / "encoder.pth", _use_new_zipfile_serialization=zipped)
    _make_languagebind(folder)
    to = ["--base", folder / "llama", "--target", folder / "model", "--delta", folder / "delta"]
    _must("make-delta", *to)
    (folder / "pbin").mkdir()
    _must("extract-projector", folder / "model", "-o", folder / "pbin" / "projector.bin")
    return world


def _make_languagebind(folder: Path) -> None:
    """A repository of pictures with LoRA, as it is published, and one of sounds."""
    save_repository(folder / "languagebind-sound", "audio", vocab_size=96)
    place = save_repository(folder / "languagebind", "image", vocab_size=96, lora_r=2)
    state = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    for name in [name for name in state if name.startswith("vision_model.encoder.")]:
        value = state.pop(name)
        name = name.replace(".encoder.", ".encoder.base_model.model.")
        state[name] = value
        if name.endswith("q_proj.weight"):
            stem, (rows, columns) = name.removesuffix(".weight"), value.shape
            state[f"{stem}.lora_A.default.weight"] = torch.randn(2, columns)
            state[f"{stem}.lora_B.default.weight"] = torch.randn(rows, 2)
    torch.save(state, place / "pytorch_model.bin")


def _must(*words: str | Path) -> None:
    code, message = run([str(word) for word in words])
    if code:
        raise SystemExit(f"{words[0]}: {message}")
