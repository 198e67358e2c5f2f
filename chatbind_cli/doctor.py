"""What this program can use on this machine: a record for each thing that was looked at.

`status` is `ok`, `note` (something is less than it could be) or `problem` (the main job cannot
run); `value` is what is there, and `hint` what to do about it, where there is something.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import chatbind_cli
from chatbind_cli.errors import UsageError, reason
from chatbind_cli.files import free_bytes
from chatbind_cli.hardware import cpu_count, memory
from chatbind_cli.jsonl import Record
from chatbind_cli.urls import public_url

OK, NOTE, PROBLEM = "ok", "note", "problem"

_NEEDED = ("torch", "transformers", "av")  # without these nothing below is worth a look
# Compiled for one version of each other: the versions alone do not tell whether they load.
_LOADED = {
    "torch": "torch",
    "torchaudio": "torchaudio",
    "transformers": "transformers",
    "av": "av",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "flash-attn": "flash_attn",
    "liger-kernel": "liger_kernel",
    "bitsandbytes": "bitsandbytes",
}
_EXTRA = {
    "flash-attn": "faster attention on GPUs; without it PyTorch's own kernels are used",
    "liger-kernel": "less memory in training on GPUs",
    "bitsandbytes": "`--load-in`, `finetune --load-in-4bit` and 8-bit optimizers, on GPUs",
}
_REINSTALL = "install it again with the versions of constraints.txt"
_DTYPES = ("float32", "bfloat16", "float16")
# ImageBind-Huge and a 7B model in half precision, with room to work.
_MEMORY_FOR_7B = 20e9
# Base, delta and target of a 7B model, and ImageBind-Huge.
_DISK_FOR_7B = 46e9
_HUB_TIMEOUT_S = 5.0


def examine(output: Path, *, network: bool = True) -> Iterator[Record]:
    """Looks at the machine, and tells as it goes.

    Args:
        output: the folder that downloads land below.
        network: whether the hub is asked.
    """
    broken = False
    for found in packages():
        broken = broken or (found["status"] == PROBLEM and found["name"] in _NEEDED)
        yield found
    if not broken:  # what is missing has been said; what needs it would only repeat it
        yield from devices()
        yield from decoders()
    yield from _room(output)
    if network:
        yield from hub()


def _found(area: str, name: str, status: str, value: str, hint: str | None = None) -> Record:
    record: Record = {"area": area, "name": name, "status": status, "value": value}
    return record if hint is None else {**record, "hint": hint}


def packages() -> Iterator[Record]:
    """Python, each package that is asked for, and those of GPUs: versions, and if they load."""
    from packaging.requirements import Requirement  # noqa: PLC0415  comes with transformers

    yield _found("python", "python", OK, platform.python_version())
    try:
        asked = metadata.requires("chatbind") or []
    except metadata.PackageNotFoundError:
        hint = "run from a checkout: make install"
        yield _found("package", "chatbind", NOTE, "not installed", hint)
        asked = [name for name in _LOADED if name not in _EXTRA]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            hint = f"{requirement.specifier} is asked for: {_REINSTALL}"
            fits = requirement.specifier.contains
            version = _version(requirement.name)
            if version is not None and not fits(version, prereleases=True):
                yield _found("package", requirement.name, PROBLEM, version, hint)
            else:
                yield _package(requirement.name, version, PROBLEM, _REINSTALL)
    for name, purpose in _EXTRA.items():
        hint = f"{purpose}: pip install {name}, built for this PyTorch"
        yield _package(name, _version(name), NOTE, hint)


def _package(name: str, version: str | None, otherwise: str, hint: str) -> Record:
    """A package whose version is right; `otherwise` is the status if it is not there or broken."""
    if version is None:
        return _found("package", name, otherwise, "not installed", hint)
    try:
        if name in _LOADED:
            importlib.import_module(_LOADED[name])
    except Exception as error:  # whatever a module does when it is loaded
        value = f"{version} does not load ({reason(error)})"
        return _found("package", name, otherwise, value, hint)
    return _found("package", name, OK, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Record]:
    """Each device: what it is, its memory, the dtypes that it multiplies, kernels for attention."""
    import torch

    from chatbind_cli.model.attention import resolve_attention  # noqa: PLC0415  loads transformers

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    for name in names:
        what = f"{cpu_count()} cores, {torch.get_num_threads()} threads"
        if name.startswith("cuda"):
            facts = torch.cuda.get_device_properties(name)
            what = f"{facts.name}, {facts.total_memory / 1e9:.1f} GB"
        works = [dtype for dtype in _DTYPES if _multiplies(name, dtype)]
        if "float32" in works:
            yield _found("device", name, OK, f"{what}; {', '.join(works)}")
        else:
            hint = "check the driver and PyTorch's build"
            yield _found("device", name, PROBLEM, f"{what}; cannot multiply", hint)
    if len(names) == 1:
        hint = "a 7B model takes minutes an answer on a CPU"
        yield _found("device", "gpu", NOTE, "none that PyTorch can use", hint)
    for kernel in ("sdpa", "flash_attention_2", "flash_attention_3"):
        try:
            resolve_attention(kernel, torch.device(names[-1]), torch.bfloat16)
            yield _found("attention", kernel, OK, f"works on {names[-1]}")
        except UsageError as error:
            yield _found("attention", kernel, NOTE, error.what.partition(": ")[2])


def _multiplies(device: str, dtype: str) -> bool:
    import torch

    try:
        matrix = torch.eye(8, device=device, dtype=getattr(torch, dtype))
        return float((matrix @ matrix).sum()) == 8.0
    except (RuntimeError, TypeError):
        return False


def decoders() -> Iterator[Record]:
    """Each kind of media: what a small recording, made on the spot, is decoded to."""
    import numpy as np

    from chatbind_cli.encoders.encoder import load_media  # noqa: PLC0415  loads torch
    from chatbind_cli.encoders.opening import usual_reader  # noqa: PLC0415
    from chatbind_cli.media.modality import MODALITIES  # noqa: PLC0415
    from chatbind_cli.toy.digits import Item  # noqa: PLC0415
    from chatbind_cli.toy.media import media_bytes  # noqa: PLC0415

    scan, read = np.tri(8, dtype=np.float32), usual_reader()
    for modality in MODALITIES:
        try:
            data = media_bytes(Item("train", 0, 3, scan), modality, seed=0)
            tensor = load_media(read, data, modality).tensor
        except Exception as error:  # whatever a decoder does
            yield _found("media", modality, PROBLEM, reason(error), "see the packages above")
        else:
            shape = " x ".join(map(str, tensor.shape))
            yield _found("media", modality, OK, f"decoded to {shape}")


def _room(folder: Path) -> Iterator[Record]:
    """Free memory, and free disk where `folder` is (or would be)."""
    found = memory()
    rooms = [
        ("memory", found and found[1], _MEMORY_FOR_7B, "a 7B model with ImageBind-Huge"),
        ("disk", free_bytes(folder), _DISK_FOR_7B, "base, delta and sum of a 7B model"),
    ]
    for name, free, wanted, purpose in rooms:
        if free is not None:
            hint = None if free >= wanted else f"{purpose} wants {wanted / 1e9:.0f} GB"
            status = OK if hint is None else NOTE
            yield _found("room", name, status, f"{free / 1e9:.1f} GB free", hint)


def hub() -> Iterator[Record]:
    """Whether the hub answers, and whether it takes the token, which is never shown."""
    import httpx
    import huggingface_hub
    from huggingface_hub import constants

    offline, endpoint = huggingface_hub.is_offline_mode(), constants.ENDPOINT
    if offline:
        yield _found("hub", "address", NOTE, "not asked: HF_HUB_OFFLINE is set")
    else:
        try:
            answer = httpx.head(endpoint, timeout=_HUB_TIMEOUT_S, follow_redirects=True)
            code = answer.status_code
            status, value = (OK, "answers") if code < 500 else (NOTE, f"says {code}")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            status, value = NOTE, "does not answer"
        hint = "check the network, the proxy and HF_ENDPOINT; what is here works without it"
        shown = f"{public_url(endpoint)} {value}"
        yield _found("hub", "address", status, shown, None if status == OK else hint)
    if huggingface_hub.get_token() is None:
        hint = "gated repositories such as LLaMA's want one: `hf auth login`, or set HF_TOKEN"
        yield _found("hub", "token", NOTE, "none", hint)
    elif offline:
        yield _found("hub", "token", OK, "there is one")
    else:
        yield _token()


def _token() -> Record:
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="chatbind", library_version=chatbind_cli.__version__)
    try:
        api.whoami()
    except Exception as error:  # the library has many
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            hint = "`hf auth login`, or set HF_TOKEN"
            return _found("hub", "token", NOTE, "there is one, and the hub refuses it", hint)
        return _found("hub", "token", NOTE, "there is one; the hub could not be asked about it")
    return _found("hub", "token", OK, "there is one, and the hub takes it")
