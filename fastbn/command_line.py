"""argparse with errors in one line, options between the names of files, and the nearest name for one that is wrong."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from fastbn.errors import ArgumentError

__all__ = ["Parser", "read"]

# What argparse takes for a number, and not for an option.
NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")


class Parser(argparse.ArgumentParser):
    """A parser of the command line, or of one command."""

    def error(self, message: str) -> NoReturn:
        """Raise ArgumentError, in one line."""
        raise ArgumentError(f"Cannot read the arguments: {message} ({self.prog} --help shows them)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # what the action's type makes of a word
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            message = f"invalid choice: {str(value)!r} (choose from {', '.join(choices)}){_nearest(str(value), choices)}"
            raise argparse.ArgumentError(action, message)

    def unrecognized(self, words: Sequence[str]) -> NoReturn:
        """Raise ArgumentError about words that are left."""
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        hint = _nearest(options[0], self._option_string_actions) if options else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    def ordered(self, words: Iterable[str]) -> list[str]:
        """Return the words with options before the names of files, however they were mixed; raises ArgumentError about unknown options."""
        options: list[str] = []
        names: list[str] = []
        unknown: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                names += rest
                break
            action, has_value = self._option(word)
            if not _is_option(word) or (action is None and " " in word):
                names.append(word)
                continue
            options.append(word)
            if action is None or has_value or action.nargs == 0:
                unknown += [word] if action is None and not self._is_beginning(word) else []
                continue
            while rest and rest[0] != "--" and not _is_option(rest[0]):
                options.append(rest.pop(0))
                if action.nargs != "+":
                    break
        if unknown:
            self.unrecognized(unknown)
        return [*options, "--", *names] if names else options

    def _is_beginning(self, word: str) -> bool:
        """Say whether some options begin with a word."""
        return any(text.startswith(word.partition("=")[0]) for text in self._option_string_actions)

    def _option(self, word: str) -> tuple[argparse.Action | None, bool]:
        """Return the option that a word is, None where it is none or several, and whether it holds the value too."""
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            found = {action for text, action in self._option_string_actions.items() if text.startswith(name)}
            exact = self._option_string_actions.get(name)
            return exact or (found.pop() if len(found) == 1 else None), bool(equals)
        for place, letter in enumerate(word[1:], 2):
            action = self._option_string_actions.get(f"-{letter}")
            if action is None or action.nargs != 0 or place == len(word):
                return action, place < len(word)
        return None, False


def _is_option(word: str) -> bool:
    """Say whether a word is an option, and no value or name."""
    return word.startswith("-") and word != "-" and not NEGATIVE.fullmatch(word)


def _nearest(word: str, names: Iterable[str]) -> str:
    """Return a question about the name that a wrong one is nearest to, "" where none is near."""
    near = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def read(top: Parser, commands: dict[str, Parser], words: Sequence[str], into: argparse.Namespace) -> Parser:
    """Read a command line into a namespace, and return the parser of its command.

    Parameters
    ----------
    top : Parser
        Of the whole line.
    commands : dict of name -> Parser
        Those of the commands, which `top` has.
    words : sequence of str
    into : argparse.Namespace

    Raises
    ------
    ArgumentError
        A word is wrong, or one is missing.
    SystemExit
        The help or the version is printed.
    """
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    command = commands.get(words[place]) if place < len(words) else None
    words = [*top.ordered(words[:place]), *words[place:]]
    if command is not None:
        words = [*words[: place + 1], *command.ordered(words[place + 1 :])]
    _, rest = top.parse_known_args(words, into)
    if rest:
        (command or top).unrecognized(rest)
    return command or top
