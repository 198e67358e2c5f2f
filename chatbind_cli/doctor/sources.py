"""The hub and the catalogue: what could be fetched from here, and what is here already.

A token is looked for and tried, and never shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import chatbind_cli
from chatbind_cli.doctor.finding import NOTE, OK, Finding

_TIMEOUT_S = 5.0


def look_at_hub() -> Iterator[Finding]:
    """Whether the hub answers, and whether it takes the token."""
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        yield Finding("hub", "address", NOTE, "not asked: HF_HUB_OFFLINE is set")
    else:
        yield _reach(constants.ENDPOINT)
    if huggingface_hub.get_token() is None:
        hint = "gated repositories such as LLaMA's want one: `hf auth login`, or set HF_TOKEN"
        yield Finding("hub", "token", NOTE, "none", hint)
    elif huggingface_hub.is_offline_mode():
        yield Finding("hub", "token", OK, "there is one")
    else:
        yield _try_token()


def _reach(endpoint: str) -> Finding:
    import httpx

    shown = _without_password(endpoint)
    try:
        status = httpx.head(endpoint, timeout=_TIMEOUT_S, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
        hint = "check the network, the proxy and HF_ENDPOINT; what is here works without it"
        return Finding("hub", "address", NOTE, f"{shown} does not answer", hint)
    if status >= 500:
        return Finding("hub", "address", NOTE, f"{shown} says {status}", "try again later")
    return Finding("hub", "address", OK, f"{shown} answers")


def _try_token() -> Finding:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi(
            library_name="chatbind", library_version=chatbind_cli.__version__
        ).whoami()
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            hint = "`hf auth login`, or set HF_TOKEN"
            return Finding("hub", "token", NOTE, "there is one, and the hub refuses it", hint)
        return Finding("hub", "token", NOTE, "there is one; the hub could not be asked about it")
    except (OSError, ValueError, RuntimeError, errors.HTTPError):  # type: ignore[attr-defined]
        return Finding("hub", "token", NOTE, "there is one; the hub could not be asked about it")
    return Finding("hub", "token", OK, "there is one, and the hub takes it")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def look_at_catalogue(output: Path) -> Iterator[Finding]:
    """Which entries of the catalogue are below a folder."""
    from chatbind_cli.download.catalogue import entries  # noqa: PLC0415  other rooms, at need
    from chatbind_cli.download.manifest import listed  # noqa: PLC0415

    for entry in entries().values():
        record = listed(entry, output)
        if record["present"]:
            yield Finding("file", entry.name, OK, str(record["path"]))
        else:
            yield Finding("file", entry.name, NOTE, "not here", f"chatbind download {entry.name}")
