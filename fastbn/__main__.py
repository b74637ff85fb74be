"""The command, as `fastbn` and as python -m fastbn."""

from fastbn.interrupts import interrupts_end_it

with interrupts_end_it():
    from fastbn.cli import run

__all__ = ["run"]

if __name__ == "__main__":
    run()
