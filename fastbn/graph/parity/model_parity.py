"""Parity of the whole model, in onnxruntime with its optimizer off on both sides.

Rounding errors grow or shrink on their way to the outputs, depending on the conditioning of the model, for which there is no formula. They
are measured: the original runs again with every batch normalization perturbed by a few units of rounding (noise.py), and the outputs may
differ by a small multiple of the effect. A bound near the size of an output proves nothing, and a larger difference may be rounding that
grew: then the models are compared on smaller inputs and piece by piece (cuts.py). Derivation: docs/numerics.md, "Parity of graphs".

One session is open at a time, and only the outputs of the original are kept: the comparison takes little more memory than one run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastbn.errors import FastbnError
from fastbn.graph.model.index import Index
from fastbn.graph.model.storage import load
from fastbn.graph.parity.branches import missed_choices
from fastbn.graph.parity.comparable import comparable, has_branches
from fastbn.graph.parity.cuts import CutParity, check_cuts
from fastbn.graph.parity.difference import is_numeric, max_change, small_channel
from fastbn.graph.parity.feeds import KINDS, MORE_KINDS, InputKind, ModelNotRun, Shapes
from fastbn.graph.parity.noise import OwnNoise
from fastbn.graph.parity.reference import MORE_DRAWS, Progress, Reference, copied, reference_of, silent
from fastbn.graph.parity.verdict import ModelsDiffer, Verdict, judged
from fastbn.graph.reasons import first_few
from fastbn.graph.results import Parity
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said

__all__ = ["Comparison"]

# Kinds of input on which the models are compared piece by piece because the outputs are zero: docs/numerics.md, "Limits of effort".
MOST_CUT = 2

# Draws of the noise for a small channel: docs/numerics.md, "Small channels".
CHANNEL_DRAWS = 3

# Why a comparison is not run whose arrays find no place.
NO_MEMORY = "the memory does not suffice for its inputs and outputs"


class Comparison:
    """An original to compare others with: all outputs, several inputs, onnxruntime's optimizer off on both sides.

    Parameters
    ----------
    original : Runnable
    index : model.Index
        Of the original.
    input_shapes : dict of name -> tuple of int, optional
        Sizes of graph inputs; without them unknown sizes are tried.
    seed : int
        Of the random inputs and the noise.
    progress : callable of str, optional
    """

    def __init__(
        self,
        original: Runnable,
        index: Index,
        *,
        input_shapes: Shapes | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.original = original
        self.index = index
        self.input_shapes = input_shapes or {}
        self.seed = seed
        self.progress = progress or silent
        self._reference: Reference | None = None
        self._not_run: str | None = None

    def check(self, folded: Runnable, suffices: Callable[[tuple[str, ...]], bool] = bool) -> Parity:
        """Compare one model with the original.

        Parameters
        ----------
        folded : Runnable
        suffices : callable of tuple of str -> bool
            Whether it is enough to prove these outputs, where the others are zero or constant; one output is enough by default.

        Returns
        -------
        Parity

        Raises
        ------
        ModelError
            The original is made of standard operators and onnxruntime says that it is no valid model.
        """
        if self._reference is None and self._not_run is None:
            try:
                self._reference = reference_of(self.original, self.index, self.input_shapes, self.seed, self.progress)
            except ModelNotRun as reason:
                self._not_run = str(reason)
            except MemoryError:
                self._not_run = NO_MEMORY
        if self._reference is None:
            return Parity("not-run", reason=self._not_run)
        try:
            return _Check(self._reference, folded, suffices).parity()
        except MemoryError:
            return Parity("not-run", reason=NO_MEMORY)


@dataclass(frozen=True)
class _Entry:
    """One output on one kind of input, compared."""

    kind: InputKind
    number: int
    verdict: Verdict

    @property
    def proves(self) -> bool:
        """Say whether this proves the output equal; on zeros most of a network computes nothing that depends on the weights."""
        return self.kind != "zero" and self.verdict.proves


class _Check:
    """One folded model beside the original."""

    def __init__(self, reference: Reference, folded: Runnable, suffices: Callable[[tuple[str, ...]], bool]) -> None:
        self.reference = reference
        self.folded = folded
        self.suffices = suffices
        self.missed: list[str] = []
        self.entries: dict[tuple[InputKind, int], _Entry] = {}
        self.notes: list[str] = []
        self.own: OwnNoise | None = None
        self.progress = reference.progress

    def parity(self) -> Parity:
        """Return the Parity."""
        try:
            self._prepare()
            self._compare(KINDS)
            if not self.entries:
                return Parity("not-run", reason="; ".join(self._all_notes()) or "the model has no outputs to compare")
            if self._unproven() and not self._different():
                self._compare(MORE_KINDS)
            if self._unproven() or self._different():
                return self._by_cuts()
            return self._result("ok")
        except ModelsDiffer as difference:
            if difference.verdict is not None:
                return self._result("failed", difference.verdict, str(difference))
            return Parity("failed", reason=str(difference), notes=self._all_notes())

    def _prepare(self) -> None:
        """Make the folded model comparable where the original had to be."""
        self.progress("loading the folded model")
        if self.reference.prepared:
            copy = comparable(self.folded.proto())
            self.folded = self.folded if copy is None else self.folded.with_proto(copy)

    def _compare(self, kinds: tuple[InputKind, ...]) -> None:
        """Compare the outputs on these kinds of input; where one draw of the noise does not explain a difference, measure it by more."""
        self.reference.run(kinds)
        unexplained: dict[InputKind, list[object]] = {}
        with Runner(self.folded, self.reference.fresh) as runner:
            self._check_names(runner)
            for place, kind in enumerate(kinds):
                if kind not in self.reference.outputs:
                    continue
                self.progress(f"comparing the models on input {place + 1} of {len(kinds)} ({kind})")
                try:
                    after = runner.run(None, self.reference.feeds.make(kind))
                except runtime_errors() as error:
                    raise ModelsDiffer(f"onnxruntime cannot run the folded model: {said(error)}") from error
                if not self._judge(kind, after):
                    unexplained[kind] = [copied(output) for output in after]
                del after  # it would hold the session's memory
        for kind, outputs in unexplained.items():
            self.reference.draw(kind)
            if not self._judge(kind, outputs):
                self._judge_by_own_noise(kind, outputs)
            self._judge_small_channels(kind, outputs)

    def _check_names(self, runner: Runner) -> None:
        try:
            names = [entry.name for entry in runner.session().get_outputs()]
        except runtime_errors() as error:
            raise ModelsDiffer(f"onnxruntime cannot load the folded model: {said(error)}") from error
        same = len(names) == len(self.reference.names) if self.reference.prepared else names == self.reference.names
        if not same:
            raise ModelsDiffer(f"the outputs are {self.reference.names} and {names}")

    def _judge(self, kind: InputKind, outputs: Sequence[object]) -> bool:
        """Compare the outputs of one run; say whether all hold, small channels included."""
        held = True
        rows = zip(self.reference.names, self.reference.outputs[kind], outputs, strict=True)
        for number, (name, before, after) in enumerate(rows):
            if number in self.reference.unrepeatable:
                self._note(f"output '{name}' is random: it differs between two runs of the original")
            elif not is_numeric(before) or not is_numeric(after):
                self._note(f"output '{name}' is no tensor of numbers: not compared")
            elif before.shape != after.shape:
                self._check_shape(kind, number, before.shape, after.shape)
            elif before.size:
                verdict = judged(name, before, after, self.reference.effect(kind, number), self.reference.noise.unit)
                self.entries[kind, number] = _Entry(kind, number, verdict)
                held = held and not verdict.is_wrong and small_channel(before, after) is None
        return held

    def _judge_by_own_noise(self, kind: InputKind, outputs: Sequence[object]) -> None:
        """Judge small differences that the rounding of the original does not explain by that of the folded model too."""
        numbers = [number for (at, number), entry in self.entries.items() if at == kind and entry.verdict.may_be_rounding]
        if not numbers:
            return
        after = {number: output for number, output in enumerate(outputs) if number in numbers and is_numeric(output)}
        own = dict.fromkeys(after, 0.0)
        for noisy in self._own_noise(kind):
            for number, output in after.items():
                moved = noisy[number]
                if is_numeric(moved) and moved.shape == output.shape:
                    own[number] = max(own[number], max_change(output, moved))
        for number, output in after.items():
            before, name = self.reference.outputs[kind][number], self.reference.names[number]
            if is_numeric(before):
                verdict = judged(name, before, output, self.reference.effect(kind, number) + own[number], self.reference.noise.unit)
                self.entries[kind, number] = _Entry(kind, number, verdict)

    def _own_noise(self, kind: InputKind) -> Iterator[list[object]]:
        """Yield the outputs of the folded model for one kind of input, draw by draw of its own noise."""
        if self.own is None:
            with contextlib.suppress(FastbnError):  # its data files lie elsewhere
                self.own = OwnNoise(self.reference.index, Index(load(self.folded.model)))
        if self.own is None:
            return
        with Runner(self.folded.with_proto(self.own.proto), self.reference.fresh) as runner, contextlib.suppress(*runtime_errors()):
            for turn in range(MORE_DRAWS):
                self.progress(f"measuring the rounding noise of the folded model on input '{kind}', draw {turn + 1} of {MORE_DRAWS}")
                rng = np.random.default_rng([self.reference.feeds.seed, turn])
                yield runner.run(None, self.own.perturbed(self.reference.feeds.make(kind), rng))

    def _judge_small_channels(self, kind: InputKind, outputs: Sequence[object]) -> None:
        """Judge a channel that is small beside the others of its output by its own noise: that of the others would hide its error."""
        for number, (before, after) in enumerate(zip(self.reference.outputs[kind], outputs, strict=True)):
            entry = self.entries.get((kind, number))
            if entry is None or not entry.verdict.holds or not is_numeric(before) or not is_numeric(after):
                continue
            channel = small_channel(before, after)
            if channel is not None:
                draws = (noisy[number] for noisy in self.reference.noisy(kind, CHANNEL_DRAWS))
                same = (draw for draw in draws if is_numeric(draw) and draw.shape == before.shape)
                noise = max((max_change(before[channel], draw[channel]) for draw in same), default=0.0)
                verdict = judged(entry.verdict.name, before[channel], after[channel], noise, self.reference.noise.unit)
                self.entries[kind, number] = _Entry(kind, number, verdict)

    def _check_shape(self, kind: InputKind, number: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        name = self.reference.names[number]
        if all(getattr(noisy[number], "shape", None) == before for noisy in self.reference.noisy(kind)):
            raise ModelsDiffer(f"output '{name}': shapes {before} and {after} differ")
        self._note(f"output '{name}' changes its shape with rounding: not compared")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _all_notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.reference.notes, *self.notes]))

    def _different(self) -> list[_Entry]:
        """Return the entries that do not hold. On zeros an output may be nothing but rounding: such an entry does not count where another
        kind of input has proven the output equal."""
        proven = self._proven_numbers()
        entries = [entry for entry in self.entries.values() if not entry.verdict.holds]
        return [entry for entry in entries if entry.kind != "zero" or entry.verdict.is_wrong or entry.number not in proven]

    def _proven_numbers(self) -> set[int]:
        return {entry.number for entry in self.entries.values() if entry.proves}

    def _unproven(self) -> list[_Entry]:
        """Return the entries of outputs that no input but zeros has proven equal."""
        proven = self._proven_numbers()
        return [entry for entry in self.entries.values() if entry.number not in proven]

    def _by_cuts(self) -> Parity:
        """Return the parity where the outputs prove nothing: compared piece by piece the models may be equal all the same."""
        different = self._different()
        if not different:
            return self._zeros_by_cuts()
        worst = max((entry.verdict for entry in different), key=lambda verdict: (verdict.is_wrong, verdict.part))
        if not np.isfinite(worst.worst.error):
            return self._result("failed", worst, "Inf or NaN on one side only")
        cut: CutParity | None = None
        kinds: list[InputKind] = [entry.kind for entry in different]
        for kind in dict.fromkeys(kinds):
            cut = self._cuts(kind)
            if cut is None or cut.status != "ok":
                break
        if cut is not None and cut.status == "ok":
            return self._held_by(cut)
        if worst.is_wrong:
            return self._result("failed", worst)
        if cut is not None and cut.status == "failed":
            return self._result("failed", cut.worst, "with values of the original in the place of its own")
        return self._result("inconclusive", worst, worst.why_inconclusive)

    def _zeros_by_cuts(self) -> Parity:
        compared: tuple[str, ...] = ()
        if not self.suffices(self._proven()):
            kinds: list[InputKind] = [kind for kind in (*KINDS[:2], *MORE_KINDS) if kind in self.reference.outputs]
            for kind in kinds[:MOST_CUT]:
                cut = self._cuts(kind)
                if cut is not None and cut.status == "ok":
                    return self._held_by(cut)
                compared = cut.proven if cut is not None else compared
        if self._proven():
            unproven = dict.fromkeys(repr(entry.verdict.name) for entry in self._unproven())
            self._note(f"zero, Inf, NaN or always the same on every input tried: output {first_few([*unproven])}")
            return self._result("ok")
        reason = "the outputs are zero, Inf, NaN or always the same on every input but zeros"
        return replace(self._result("inconclusive", reason=reason), compared=compared)

    def _proven(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.verdict.name for entry in self.entries.values() if entry.proves))

    def _cuts(self, kind: InputKind) -> CutParity | None:
        reference = self.reference
        if reference.fresh:  # the values of one run are not those of another
            return None
        self.progress(f"comparing the models piece by piece on input '{kind}'")
        feed = reference.feeds.make(kind)
        try:
            return check_cuts(reference.model, reference.proto, self.folded, reference.index, reference.noise, feed, reference.feeds.seed)
        except runtime_errors():  # a value inside the model has a type that cannot be an output
            return None

    def _held_by(self, cut: CutParity) -> Parity:
        self._note(f"compared piece by piece, at {cut.cuts} values on the way")
        parity = self._result("ok", cut.worst)
        return replace(parity, compared=tuple(dict.fromkeys([*parity.compared, *cut.proven])))

    def _result(self, status: Literal["ok", "failed", "inconclusive"], verdict: Verdict | None = None, reason: str | None = None) -> Parity:
        """Return the Parity, with one output compared: the worst one where none is given."""
        proven = [entry for entry in self.entries.values() if entry.proves]
        if verdict is None:
            verdict = max((entry.verdict for entry in proven or self.entries.values()), key=lambda each: each.part)
        if status == "ok" and has_branches(self.reference.proto):
            for choice in missed_choices(self.reference, self.folded, self._note):
                self.missed.append(choice)
        worst = verdict.worst
        return Parity(
            status,
            inputs=len({entry.kind for entry in self.entries.values()}),
            output=verdict.name,
            index=worst.index,
            values=worst.values,
            error=worst.error,
            allowed=verdict.allowed,
            reason=reason,
            notes=self._all_notes(),
            compared=self._proven() if status != "failed" else (),
            missed=tuple(self.missed),
        )
