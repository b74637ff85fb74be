"""Parity of the whole model, in onnxruntime with its optimizer off on both sides.

Rounding grows or shrinks on its way to the outputs, by the model's own conditioning, which no formula knows. It is measured: the
original runs again with every batch normalization disturbed by a few units of rounding (noise.py), and the outputs may differ by a small
multiple of what that changes. A bound near the size of an output proves nothing, and a larger difference may be rounding that grew: then
the models are compared on smaller inputs and piece by piece (cuts.py).

One session is open at a time, and of the outputs only the original's are kept: the comparison takes little more memory than one run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fastbn.graph.model.index import Index
from fastbn.graph.parity.comparable import comparable, has_branches, with_branches
from fastbn.graph.parity.cuts import CutParity, Verdict, check_cuts, judged
from fastbn.graph.parity.difference import moved, small_channel
from fastbn.graph.parity.feeds import KINDS, MORE_KINDS, Feed, ModelNotRun
from fastbn.graph.parity.noise import Noise
from fastbn.graph.parity.reference import Reference, kept, reference_of
from fastbn.graph.reasons import first_few
from fastbn.graph.results import Parity
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said

__all__ = ["Comparison"]


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
        input_shapes: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.original = original
        self.index = index
        self.input_shapes = input_shapes or {}
        self.seed = seed
        self.progress = progress or (lambda text: None)
        self._reference: Reference | None = None
        self._not_run: str | None = None

    def check(self, folded: Runnable, suffices: Callable[[tuple[str, ...]], bool] = bool) -> Parity:
        """Compare one model with the original.

        Parameters
        ----------
        folded : Runnable
        suffices : callable of tuple of str -> bool
            Whether it is enough to prove these outputs, where the others are zero or always the same; one output is, by default.

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
        if self._reference is None:
            return Parity("not-run", reason=self._not_run)
        return _Check(self._reference, folded, suffices).parity()


@dataclass(frozen=True)
class _Entry:
    """One output on one kind of input, compared."""

    kind: str
    number: int
    verdict: Verdict

    @property
    def proves(self) -> bool:
        """Say whether this proves the output equal: on zeros most of a network is idle."""
        return self.kind != "zero" and self.verdict.proves


# Kinds of input on which outputs of zeros are looked behind.
MOST_CUT = 2


# Draws of the noise for one channel.
CHANNEL_DRAWS = 3


class _Failed(Exception):
    """A difference that no noise can explain, in a sentence, and the Verdict about it; without one the models cannot even be compared."""

    def __init__(self, sentence: str, verdict: Verdict | None = None) -> None:
        super().__init__(sentence)
        self.verdict = verdict


class _Check:
    """One folded model beside the original."""

    def __init__(self, reference: Reference, folded: Runnable, suffices: Callable[[tuple[str, ...]], bool]) -> None:
        self.reference = reference
        self.folded = folded
        self.suffices = suffices
        self.missed: list[str] = []
        self.entries: dict[tuple[str, int], _Entry] = {}
        self.notes: list[str] = []
        self.progress = reference.progress

    def parity(self) -> Parity:
        try:
            self._prepare()
            self._compare(KINDS)
            if not self.entries:
                return Parity("not-run", reason="; ".join(self._all_notes()) or "the model has no outputs to compare")
            if self._unproven() and not self._different():
                self._compare(MORE_KINDS)
            if self._unproven() or self._different():
                return self._by_cuts()
            return self._said("ok")
        except _Failed as failure:
            if failure.verdict is not None:
                return self._said("failed", failure.verdict, str(failure))
            return Parity("failed", reason=str(failure), notes=self._all_notes())

    def _prepare(self) -> None:
        """Make the folded model comparable where the original had to be."""
        self.progress("loading the folded model")
        if self.reference.prepared:
            copy = comparable(self.folded.proto())
            self.folded = self.folded if copy is None else self.folded.with_proto(copy)

    def _compare(self, kinds: tuple[str, ...]) -> None:
        """Run the folded model on these kinds of input; where more differs than the noise explains at first, measure it again there."""
        self.reference.run(kinds)
        doubtful = {}
        with Runner(self.folded, self.reference.fresh) as runner:
            self._check_names(runner)
            for place, kind in enumerate(kinds):
                if kind not in self.reference.outputs:
                    continue
                self.progress(f"comparing the models on input {place + 1} of {len(kinds)} ({kind})")
                try:
                    after = runner.run(None, self.reference.feeds.make(kind))
                except runtime_errors() as error:
                    raise _Failed(f"onnxruntime cannot run the folded model: {said(error)}") from error
                if not self._judge(kind, after):
                    doubtful[kind] = [kept(output) for output in after]
                del after  # it would keep the session's memory
        for kind, after in doubtful.items():
            self.reference.draw(kind)
            self._judge(kind, after)
            self._judge_small_channels(kind, after)

    def _check_names(self, runner: Runner) -> None:
        try:
            names = [entry.name for entry in runner.session().get_outputs()]
        except runtime_errors() as error:
            raise _Failed(f"onnxruntime cannot load the folded model: {said(error)}") from error
        same = len(names) == len(self.reference.names) if self.reference.prepared else names == self.reference.names
        if not same:
            raise _Failed(f"the outputs are {self.reference.names} and {names}")

    def _judge(self, kind: str, after: list) -> bool:
        """Compare the outputs of one run; say whether all hold."""
        held = True
        for number, (name, before) in enumerate(zip(self.reference.names, self.reference.outputs[kind], strict=True)):
            moves = self.reference.moves(kind, number)
            if number in self.reference.unrepeatable:
                self._note(f"output '{name}' is random: it differs between two runs of the original")
            elif not isinstance(before, np.ndarray) or before.dtype.kind not in "fiub":
                self._note(f"output '{name}' is no tensor of numbers: not compared")
            elif before.shape != after[number].shape:
                self._check_shape(kind, number, before.shape, after[number].shape)
            elif before.size:
                verdict = judged(name, before, after[number], moves, self.reference.noise.unit)
                self.entries[kind, number] = _Entry(kind, number, verdict)
                held = held and not verdict.is_wrong and small_channel(before, after[number]) is None
        return held

    def _judge_small_channels(self, kind: str, after: list) -> None:
        """Judge a channel that is small beside the others of its output by its own noise: that of the others would hide it."""
        for number, before in enumerate(self.reference.outputs[kind]):
            entry = self.entries.get((kind, number))
            channel = small_channel(before, after[number]) if entry is not None and entry.verdict.holds else None
            if channel is not None:
                draws = (shaken[number] for shaken in self.reference.shaken(kind, CHANNEL_DRAWS))
                noise = max((moved(before[channel], draw[channel]) for draw in draws if draw.shape == before.shape), default=0.0)
                verdict = judged(entry.verdict.name, before[channel], after[number][channel], noise, self.reference.noise.unit)
                self.entries[kind, number] = _Entry(kind, number, verdict)

    def _check_shape(self, kind: str, number: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        name = self.reference.names[number]
        if all(shaken[number].shape == before for shaken in self.reference.shaken(kind)):
            raise _Failed(f"output '{name}': shapes {before} and {after} differ")
        self._note(f"output '{name}' changes its shape with rounding: not compared")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _all_notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.reference.notes, *self.notes]))

    # ---- what the comparison is worth ----

    def _different(self) -> list[_Entry]:
        """Return the entries that do not hold; on zeros an output may be nothing but rounding, which says nothing where another input has
        proven it."""
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
        """Return the parity where the outputs do not tell: piece by piece the models may be equal all the same."""
        different = self._different()
        if not different:
            return self._zeros_by_cuts()
        worst = max((entry.verdict for entry in different), key=lambda verdict: (verdict.is_wrong, verdict.part))
        if not np.isfinite(worst.worst.error):
            return self._said("failed", worst, "Inf or NaN on one side only")
        for kind in dict.fromkeys(entry.kind for entry in different):
            cut = self._cuts(kind)
            if cut is None or cut.status != "ok":
                break
        else:
            return self._held_by(cut)
        if worst.is_wrong:
            return self._said("failed", worst)
        if cut is not None and cut.status == "failed":
            return self._said("failed", cut.worst, "with values of the original in the place of its own")
        return self._said("inconclusive", worst, worst.doubt)

    def _zeros_by_cuts(self) -> Parity:
        behind: tuple[str, ...] = ()
        if not self.suffices(self._proven()):
            for kind in [kind for kind in (*KINDS[:2], *MORE_KINDS) if kind in self.reference.outputs][:MOST_CUT]:
                found = self._cuts(kind)
                if found is not None and found.status == "ok":
                    return self._held_by(found)
                behind = found.proven if found is not None else behind
        if self._proven():
            vague = dict.fromkeys(repr(entry.verdict.name) for entry in self._unproven())
            self._note(f"zero, Inf, NaN or always the same on every input tried: output {first_few([*vague])}")
            return self._said("ok")
        parity = self._said("inconclusive", reason="the outputs are zero, Inf, NaN or always the same on every input but zeros")
        return replace(parity, compared=behind)

    def _proven(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.verdict.name for entry in self.entries.values() if entry.proves))

    def _cuts(self, kind: str) -> CutParity | None:
        reference = self.reference
        if reference.fresh:  # the values of one run are not those of another
            return None
        self.progress(f"comparing the models piece by piece on input '{kind}'")
        feed = reference.feeds.make(kind)
        try:
            return check_cuts(reference.model, reference.proto, self.folded, reference.index, reference.noise, feed, reference.feeds.seed)
        except runtime_errors():  # a value on the way is of a kind that cannot be handed out
            return None

    def _held_by(self, cut: CutParity) -> Parity:
        self._note(f"compared piece by piece, at {cut.cuts} values on the way")
        parity = self._said("ok", cut.worst)
        return replace(parity, compared=tuple(dict.fromkeys([*parity.compared, *cut.proven])))

    def _said(self, status: str, verdict: Verdict | None = None, reason: str | None = None) -> Parity:
        """Return the parity, with one output compared: the worst one where none is given."""
        proven = [entry for entry in self.entries.values() if entry.proves]
        if verdict is None:
            verdict = max((entry.verdict for entry in proven or self.entries.values()), key=lambda each: each.part)
        if status == "ok" and has_branches(self.reference.proto):
            self._compare_branches()
        worst, inputs = verdict.worst, len({entry.kind for entry in self.entries.values()})
        names = self._proven() if status != "failed" else ()
        compared = (verdict.name, worst.index, worst.values, worst.error, verdict.allowed)
        return Parity(status, inputs, *compared, reason, self._all_notes(), names, tuple(self.missed))

    def _compare_branches(self) -> None:
        """Run both branches of every If, and every Loop at least once: random inputs need not reach them."""
        reference = self.reference
        original, ways = with_branches(reference.proto)
        folded = self.folded.with_proto(with_branches(self.folded.proto())[0])
        noise = Noise(reference.index, original)
        for which, chosen in ways.items():
            feed = {**reference.feeds.make(KINDS[0]), **chosen}
            self.progress(f"comparing the {which} of both models")
            try:
                before = self._run_branch(reference.model.with_proto(original), feed)
                noisy = noise.disturbed(feed, np.random.default_rng(reference.feeds.seed), sums=True)
                shaken = self._run_branch(reference.model.with_proto(noise.proto), noisy)
            except runtime_errors() as error:
                self._note(f"the {which} cannot all be run: {said(error)}")
                self.missed.append(which)
                continue
            try:
                after = self._run_branch(folded, feed)
            except runtime_errors() as error:
                raise _Failed(f"onnxruntime cannot run the {which} of the folded model: {said(error)}") from error
            proven = [
                self._judge_branch(which, name, before[number], after[number], shaken[number], noise.unit)
                for number, name in enumerate(reference.names)
                if number not in reference.unrepeatable
            ]
            if not any(proven):
                self._note(f"the {which} give nothing that proves anything")
                self.missed.append(which)

    def _run_branch(self, model: Runnable, feed: Feed) -> list:
        with Runner(model, self.reference.fresh) as runner:
            wanted = {entry.name for entry in runner.get_inputs()}
            found = runner.run(None, {name: values for name, values in feed.items() if name in wanted})
            return [kept(output) for output in found]

    def _judge_branch(self, which: str, name: str, before: object, after: object, shaken: object, unit: float) -> bool:
        """Compare one output; say whether that proves anything."""
        if not isinstance(before, np.ndarray) or before.dtype.kind not in "fiub" or not before.size:
            return False
        if before.shape != after.shape:
            raise _Failed(f"output '{name}' of the {which}: shapes {before.shape} and {after.shape} differ")
        noise = moved(before, shaken) if shaken.shape == before.shape else 0.0
        # One draw of the noise: twice the usual margin.
        verdict = judged(name, before, after, 2 * noise, unit)
        if verdict.is_wrong:
            raise _Failed(f"in the {which}", verdict)
        if not verdict.holds:
            self._note(f"output '{name}' of the {which}: {verdict.doubt}")
        return verdict.proves
