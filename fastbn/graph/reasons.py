"""Why a batch normalization stays: the table of codes, and the refusal that carries one."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

__all__ = ["CURABLE", "FORWARDS", "REASONS", "ReasonCode", "Refusal", "first_few"]

# Separates the two parts of a reason: why the search backward failed, and why the search forward did.
FORWARDS = "; forwards: "

# Codes are stable: scripts match on them.
ReasonCode: TypeAlias = Literal[
    "training",
    "per-element",
    "dynamic-parameters",
    "overridable-parameters",
    "bad-parameters",
    "unsupported-type",
    "in-function",
    "not-selected",
    "reads-input",
    "reads-constant",
    "unused",
    "no-absorber",
    "crosses-scope",
    "other-readers",
    "other-outputs",
    "other-branch",
    "reads-twice",
    "graph-output",
    "dynamic-weight",
    "overridable-weight",
    "quantised",
    "dynamic-index",
    "axis",
    "axis-unknown",
    "padding",
    "shift-cannot-pass",
    "shift-through-relu",
    "mixed-sign-through-relu",
    "mixed-sign-through-maxpool",
    "interpolation",
    "training-dropout",
    "too-far",
    "grows",
    "overflow",
    "flush-to-zero",
    "parity",
    "no-module",
]

# Code -> what it means.
REASONS: dict[ReasonCode, str] = {
    # What the node itself is.
    "training": "it normalizes with the statistics of the batch, or hands them out; --as-inference may help",
    "per-element": "spatial=0: its parameters are per element, not per channel",
    "dynamic-parameters": "a parameter is computed when the model runs, or cannot be evaluated here",
    "overridable-parameters": "a parameter is also a graph input, which a caller may override; --freeze-inputs makes it a constant",
    "bad-parameters": "a parameter is Inf or NaN, or var + eps is not positive",
    "unsupported-type": "the type is none of float32, float64, float16, bfloat16",
    "in-function": "it stands in a model-local function, which several calls may share",
    "not-selected": "--only or --skip leaves it out",
    # Where its affine could not go.
    "reads-input": "nothing comes before it but a graph input",
    "reads-constant": "it reads a constant",
    "unused": "nothing reads it",
    "no-absorber": "a node on the way has no constants that could take the affine, and does not let it pass",
    "crosses-scope": "the way leads into another graph",
    "other-readers": "another node reads the value before it",
    "other-outputs": "a node on the way hands out more than one value",
    "other-branch": "a node on the way joins it with a value that does not have the affine",
    "reads-twice": "a node reads the value in two places, or two ways meet in one node",
    "graph-output": "a value on the way is a graph output",
    "dynamic-weight": "a weight on the way is computed when the model runs, or cannot be evaluated here",
    "overridable-weight": "a weight on the way is also a graph input, which a caller may override; --freeze-inputs makes it a constant",
    "quantised": "a quantized weight or bias on the way cannot take it exactly",
    "dynamic-index": "a node on the way chooses or pads by values that are no constants",
    "axis": "its channels are not the channels that a node on the way could take",
    "axis-unknown": "a rank or size on the way is not known, so its axis cannot be placed; --input-shape may help",
    "padding": "a shift would have to change the padding of a node on the way",
    "shift-cannot-pass": "a shift cannot pass a node on the way",
    "shift-through-relu": "a shift cannot pass a Relu",
    "mixed-sign-through-relu": "a scale that is not positive in every channel cannot pass a Relu",
    "mixed-sign-through-maxpool": "a scale that is negative in a channel cannot pass a maximum",
    "interpolation": "a node on the way interpolates in a way that need not keep a shift",
    "training-dropout": "a Dropout on the way drops at random; --as-inference may help",
    "too-far": "the way is longer than the planner follows",
    # What the fold would do.
    "grows": "a folded constant would be larger than the node that it replaces",
    "overflow": "a folded constant would be Inf or NaN in the model's type",
    "flush-to-zero": "a folded weight, factor or divisor would become zero, or lose digits in float16, beside nothing that hides it",
    "parity": "the fold was tried and differs from the original by more than rounding explains",
    "no-module": "the model in its framework has no module or parameter of its own in which that could change",
}


# What an option may change: sizes that a caller gives (--input-shape), constants that nobody overrides (--freeze-inputs).
CURABLE: tuple[ReasonCode, ...] = ("axis-unknown", "overridable-parameters", "overridable-weight")


class Refusal(Exception):
    """Why an affine cannot be folded.

    Parameters
    ----------
    code : ReasonCode
        One of REASONS.
    sentence : str
        The reason, with the names of the nodes.
    """

    def __init__(self, code: ReasonCode, sentence: str) -> None:
        assert code in REASONS, code
        super().__init__(sentence)
        self.code: ReasonCode = code
        self.sentence = sentence


def first_few(entries: Sequence[object]) -> str:
    """Return the first four entries as text, with "..." where there are more."""
    return ", ".join(map(str, entries[:4])) + (", ..." if len(entries) > 4 else "")
