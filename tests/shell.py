"""What tests of the command share: a terminal, what lies in a folder, and a deployment whose stages lose what a test says."""

import io

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
