"""Loading and saving without transformers' own bars and tables on a log.

Progress bars are for people at a terminal; in a batch job's log they are a mess, and the table of
unexpected tensors is expected where a projector lies among a language model's weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Lets transformers say nothing but errors, and draw bars on a terminal only.

    What it says of old keys in a config is for whoever wrote that.
    """
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
