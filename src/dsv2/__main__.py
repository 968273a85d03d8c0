"""``python -m dsv2`` is ``dsv2``."""

from dsv2.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
