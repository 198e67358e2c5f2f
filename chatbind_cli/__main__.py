"""`python -m chatbind_cli` is the same program as `chatbind`, also in a checkout not installed.

An installer puts the repository's `commands/` below this package. In a checkout it stands beside
it, so that there the package's path is told of it, whatever else is installed.
"""

from pathlib import Path

import chatbind_cli
from chatbind_cli.cli import main

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    if not (here / "commands").is_dir():
        chatbind_cli.__path__.append(str(here.parent))
    main()
