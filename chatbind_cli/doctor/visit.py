"""All that the doctor looks at, in order, as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatbind_cli.doctor.finding import PROBLEM, Finding

_NEEDED = ("torch", "transformers", "av")


def examine(output: Path, *, network: bool = True) -> Iterator[Finding]:
    """Looks at the machine.

    Args:
        output: the folder that downloads land below.
        network: whether the hub is asked.
    """
    from chatbind_cli.doctor.decoders import look_at_decoders  # noqa: PLC0415  as it comes to it
    from chatbind_cli.doctor.machine import look_at_devices, look_at_room  # noqa: PLC0415
    from chatbind_cli.doctor.models import look_at_models  # noqa: PLC0415
    from chatbind_cli.doctor.packages import look_at_packages  # noqa: PLC0415
    from chatbind_cli.doctor.sources import look_at_catalogue, look_at_hub  # noqa: PLC0415

    broken = False
    for finding in look_at_packages():
        broken = broken or (finding.status == PROBLEM and finding.name in _NEEDED)
        yield finding
    if not broken:  # what is missing has been said; what needs it would only repeat it
        yield from look_at_devices()
        yield from look_at_decoders()
        yield from look_at_models()
    yield from look_at_room(output)
    if network:
        yield from look_at_hub()
    yield from look_at_catalogue(output)
