"""What the tests of pages in a real browser share."""

from __future__ import annotations

import time
from typing import Any

CONTRAST = """
const channel = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const weights = [0.2126, 0.7152, 0.0722];
const light = (rgb) => weights.reduce((sum, w, i) => sum + w * channel(rgb[i] / 255), 0);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll('body *')) {
  if (!node.checkVisibility() || node.closest('svg, audio, video')) continue;
  if (![...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.className || node.tagName]);
}
return found.sort((x, y) => x[0] - y[0])[0];
"""
"""The lowest contrast of a text on the page, and what has it."""


def wait(browser: Any, script: str, seconds: float = 15.0) -> Any:
    """Waits until a script returns something true."""
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        assert time.monotonic() < deadline, script
        time.sleep(0.02)
    return value
