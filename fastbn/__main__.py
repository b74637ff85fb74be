"""python -m fastbn."""

from fastbn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
