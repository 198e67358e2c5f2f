"""Python and the packages: their versions, whether they are those asked for, whether they load."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata

from chatbind_cli.doctor.finding import NOTE, OK, PROBLEM, Finding

# Compiled for one version of each other: the versions alone do not tell whether they load.
_LOADED = {
    "torch": "torch",
    "torchvision": "torchvision",
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
    "bitsandbytes": "8-bit optimizers on GPUs",
}
_REINSTALL = "install it again with the versions of constraints.txt"


def look_at_packages() -> Iterator[Finding]:
    """A finding for Python, one for each package that is asked for, and for those of GPUs."""
    yield Finding("python", "python", OK, platform.python_version())
    try:
        asked = metadata.requires("chatbind") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "package", "chatbind", NOTE, "not installed", "run from a checkout: make install"
        )
        asked = list(_LOADED)
    for text in asked:
        yield from _asked_for(text)
    for name, purpose in _EXTRA.items():
        found = _version(name)
        if found is None:
            yield Finding("package", name, NOTE, "not installed", f"{purpose}: pip install {name}")
        elif (reason := _reason_not_to_load(name)) is not None:
            value, hint = f"{found} does not load ({reason})", "build it against this PyTorch"
            yield Finding("package", name, NOTE, value, f"{hint}, or take it away")
        else:
            yield Finding("package", name, OK, found)


def _asked_for(text: str) -> Iterator[Finding]:
    from packaging.requirements import Requirement  # noqa: PLC0415  comes with transformers

    asked = Requirement(text)
    if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
        return
    found = _version(asked.name)
    if found is None:
        yield Finding("package", asked.name, PROBLEM, "not installed", _REINSTALL)
    elif not asked.specifier.contains(found, prereleases=True):
        hint = f"{asked.specifier} is asked for: {_REINSTALL}"
        yield Finding("package", asked.name, PROBLEM, found, hint)
    else:
        reason = _reason_not_to_load(asked.name)
        if reason is None:
            yield Finding("package", asked.name, OK, found)
        else:
            value = f"{found} does not load ({reason})"
            yield Finding("package", asked.name, PROBLEM, value, _REINSTALL)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _reason_not_to_load(name: str) -> str | None:
    module = _LOADED.get(name)
    if module is None:
        return None
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
