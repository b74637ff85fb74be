"""Parity of every branch of a model: random inputs need not reach them all, so graph inputs choose them (comparable.with_branches)."""

from collections.abc import Callable, Iterator

import numpy as np

from fastbn.graph.parity.comparable import with_branches
from fastbn.graph.parity.difference import is_numeric, max_change
from fastbn.graph.parity.feeds import KINDS, Feed
from fastbn.graph.parity.noise import Noise
from fastbn.graph.parity.reference import Reference, copied
from fastbn.graph.parity.verdict import ModelsDiffer, Verdict, judged
from fastbn.graph.runtime import Runnable, Runner, runtime_errors, said

__all__ = ["missed_choices"]

# The noise is measured by one draw, so twice the usual margin is allowed: docs/numerics.md, "The bound of an output".
BRANCH_MARGIN = 2


def missed_choices(reference: Reference, folded: Runnable, note: Callable[[str], None]) -> Iterator[str]:
    """Run both branches of every If, and every Loop at least once, in both models; yield the choices in which nothing was compared.

    Parameters
    ----------
    reference : Reference
    folded : Runnable
    note : callable of str
        Called with what to say about a choice.

    Raises
    ------
    ModelsDiffer
    """
    # What an If or a Loop gives that is constant may have been folded: the other branch never runs, and the Loop never as often.
    nodes = (node for node in reference.index.order if node.is_op("If", "Loop"))
    constant = [node for node in nodes if any(reference.index.constant(value) is not None for value in node.outputs)]
    settled = {name for node in constant for name in (node.proto.input[:1] if node.op == "If" else node.proto.output) if name}
    original, choices = with_branches(reference.proto, settled)
    model = reference.model.with_proto(original)
    other = folded.with_proto(with_branches(folded.proto(), settled)[0])
    noise = Noise(reference.index, original)
    for choice, values in choices.items():
        feed = {**reference.feeds.make(KINDS[0]), **values}
        reference.progress(f"comparing the {choice} of both models")
        try:
            before = _run(model, feed, reference.fresh)
            perturbed = noise.perturbed(feed, np.random.default_rng(reference.feeds.seed), sums=True)
            noisy = _run(reference.model.with_proto(noise.proto), perturbed, reference.fresh)
        except runtime_errors() as error:
            note(f"the {choice} cannot all be run: {said(error)}")
            yield choice
            continue
        try:
            after = _run(other, feed, reference.fresh)
        except runtime_errors() as error:
            raise ModelsDiffer(f"onnxruntime cannot run the {choice} of the folded model: {said(error)}") from error
        proves = False
        for number, name in enumerate(reference.names):
            verdict = None
            if number not in reference.unrepeatable:
                verdict = _judged(name, choice, before[number], after[number], noisy[number], noise.unit)
            if verdict is not None and not verdict.holds:
                note(f"output '{name}' of the {choice}: {verdict.why_inconclusive}")
            proves = proves or (verdict is not None and verdict.proves)
        if not proves:
            note(f"the {choice} give nothing that proves anything")
            yield choice


def _run(model: Runnable, feed: Feed, fresh: bool) -> list[object]:
    with Runner(model, fresh) as runner:
        inputs = {entry.name for entry in runner.get_inputs()}
        outputs = runner.run(None, {name: values for name, values in feed.items() if name in inputs})
        return [copied(output) for output in outputs]


def _judged(name: str, choice: str, before: object, after: object, noisy: object, unit: float) -> Verdict | None:
    """Compare one output, None where it cannot be compared; raises ModelsDiffer where it is wrong."""
    if not is_numeric(before) or not is_numeric(after) or not before.size:
        return None
    if before.shape != after.shape:
        raise ModelsDiffer(f"output '{name}' of the {choice}: shapes {before.shape} and {after.shape} differ")
    effect = max_change(before, noisy) if is_numeric(noisy) and noisy.shape == before.shape else 0.0
    verdict = judged(name, before, after, BRANCH_MARGIN * effect, unit)
    if verdict.is_wrong:
        raise ModelsDiffer(f"in the {choice}", verdict)
    return verdict
