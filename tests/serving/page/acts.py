"""What a person does on the page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tests.web import wait


def attach(browser: Any, *paths: Path) -> None:
    browser.find_element("id", "files").send_keys("\n".join(map(str, paths)))


_DROP = """
const files = arguments[0].map(([name, data]) =>
  new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
const carried = new DataTransfer();
for (const file of files) carried.items.add(file);
for (const kind of ["dragenter", "dragover", "drop"]) {
  const event = new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: carried });
  document.querySelector("main").dispatchEvent(event);
}
"""


def drop(browser: Any, *paths: Path) -> None:
    files = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    browser.execute_script(_DROP, files)


def ask(browser: Any, text: str) -> None:
    browser.find_element("id", "text").send_keys(text + "\n")


def answered(browser: Any, count: int = 1) -> str:
    """The last answer, once it is whole and nobody answers any more."""
    done = (
        "const all = [...document.querySelectorAll('.answer .words')];"
        "return document.getElementById('stop').hidden && all.length === arguments[0] &&"
        " all.at(-1).ariaBusy === 'false' && [all.at(-1).textContent]"
    ).replace("arguments[0]", str(count))
    return str(wait(browser, done)[0])
