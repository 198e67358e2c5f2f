"""What evaluation harnesses need to know of this program: a model and tasks for lmms-eval.

Found by lmms-eval through the entry point `lmms_eval.models` of pyproject.toml, in every run of
it, so that nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("tasks")
"""For `lmms-eval --include_path`."""


def manifest() -> Any:
    """How lmms-eval registers a model: `lmms-eval --model chatbind`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415  not ours to need

    return ModelManifest("chatbind", chat_class_path="chatbind_cli.harness.lmms_eval.ChatBind")
