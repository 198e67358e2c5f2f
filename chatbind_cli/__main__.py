"""`python -m chatbind_cli` is the same program as `chatbind`."""

from chatbind_cli.cli import main

if __name__ == "__main__":
    main()
