"""The messages of errors: one line of a length that a terminal shows, whatever names stand in a model."""

import pytest

from fastbn.errors import ArgumentTypeError, FastbnError, ModelError, StorageError, expected


@pytest.mark.parametrize("kind", [FastbnError, ModelError, StorageError, ArgumentTypeError])
def test_a_message_is_one_line_of_bounded_length(kind):
    assert str(kind("Cannot order the nodes: 'a\nb\x1b[31m\u202e' is part of a cycle")) == (
        "Cannot order the nodes: 'a\\nb\\x1b[31m\\u202e' is part of a cycle"
    )
    long = str(kind(expected("a value", "x" * 1_000_000, "node")))
    assert len(long) <= 800
    assert long.startswith("Expected a value, got xxx")
    assert long.endswith("xxx - at `node`")
    assert str(kind("\n" * 1_000_000)).count("\n") == 0


def test_other_messages_stay_as_they_are():
    text = "Expected gr\u00f6\u00dfe \u4e2d, got " + "x" * 700
    assert str(ModelError(text)) == text
    assert str(StorageError(2, "No such file", "a")) == "[Errno 2] No such file: 'a'"
