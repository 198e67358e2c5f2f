"""One import at a time among the threads that read media.

Python lets two threads import two modules of one package at once; PyAV's modules import each other
in a circle, and then one thread finds the other's half-made module. Knows nothing of what is
imported.
"""

from __future__ import annotations

from threading import RLock

IMPORTING = RLock()
"""Hold it while a library for media is imported inside a function."""
