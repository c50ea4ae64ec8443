"""Runs the command `hf-iclr`, or says in a sentence which extra it needs."""

import sys

from hf_iclr.extras import MissingExtraError, require


def main() -> None:
    """What the installed command `hf-iclr` runs; `python -m hf_iclr` does the same."""
    try:
        require("cli", "hf-iclr", "typer", "rich")
        from hf_iclr.cli.app import app

        app()
    except MissingExtraError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
