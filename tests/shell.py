"""What tests of the command share: a terminal, what lies in a folder, and a deployment whose stages lose what a test says."""

import io
from pathlib import Path

from fastbn.cli import main
from fastbn.deployment import pipeline


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def files(folder):
    """Return the names of what lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def losing(monkeypatch, *losses):
    """Let the stages of the next deployments lose this much, one after the other."""
    rest = iter(losses)
    monkeypatch.setattr(pipeline, "drop_of", lambda found, metric: next(rest))


def fails(capsys, *arguments):
    """Run the command, demand exit code 2, one line and nothing new; return the line."""
    before = files(Path())
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert files(Path()) == before
    return err
