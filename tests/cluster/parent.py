"""Dispatches `talk.py` in place of a command: `parent.py PROCESSES WHO_DIES`."""

import sys
from pathlib import Path

import click

from chatbind_cli import launch
from chatbind_cli.errors import ChatBindError
from chatbind_cli.plan import Dispatch

launch._worker_command = lambda args, extra: list(args)
try:
    words = [str(Path(__file__).with_name("talk.py")), sys.argv[2]]
    launch.dispatch(words, Dispatch(num_processes=int(sys.argv[1]), device="cpu"))
except click.exceptions.Exit as error:
    sys.exit(error.exit_code)
except ChatBindError as error:
    sys.exit(f"{error.exit_code} {error}")
