"""The configuration that accelerate's launcher is given: a user's, or one that says nothing.

Without one the launcher reads what `accelerate config` once left in the home folder, whatever it
was for.
"""

from __future__ import annotations

from pathlib import Path

from chatbind_cli.errors import UsageError, reason

_NOTHING = Path(__file__).with_name("launch.json")
_KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")


def config_words(given: Path | None) -> list[str]:
    """The launcher's words for its configuration.

    Raises:
        UsageError: the file cannot be read, or asks for a launch that training knows nothing of:
            DeepSpeed's ZeRO-3, for one, leaves empty weights in a model that is saved.
    """
    if given is None:
        return ["--config_file", str(_NOTHING)]
    import yaml  # noqa: PLC0415  only here; it reads JSON, too

    try:
        fields = yaml.safe_load(given.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UsageError(f"--launch-config {given}: {reason(error)}") from error
    if not isinstance(fields, dict) or "distributed_type" not in fields:
        raise UsageError(f"--launch-config {given} is no configuration of accelerate")
    place, kind = fields.get("compute_environment"), fields["distributed_type"] or "NO"
    if place not in (None, "LOCAL_MACHINE") or kind not in _KNOWN:
        raise UsageError(
            f"--launch-config {given}: {kind if kind not in _KNOWN else place} is not supported",
            hint='to share a model out over processes: --fsdp "full_shard auto_wrap"',
        )
    return ["--config_file", str(given)]
