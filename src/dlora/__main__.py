"""`python -m dlora`: the same as the command `dlora`."""

from dlora.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
