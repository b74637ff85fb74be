"""python -m fastbn."""

from fastbn.cli import run

if __name__ == "__main__":
    run()
