"""The mutation check: its mutants are programs that differ from the file, and they are put in the place of what is there."""

import ast
import sys

import mutate
import pytest
from mutants import ROOT, mutants_of

from fastbn.graph.model.node import Node
from fastbn.graph.ops import elementwise, placing

FILE = ROOT / "fastbn" / "graph" / "ops" / "placing.py"


def test_mutants_are_programs_that_differ_from_the_file():
    source = ast.unparse(ast.parse(FILE.read_text(encoding="utf-8")))
    mutants = mutants_of(FILE)
    assert len({mutant.text for mutant in mutants}) == len(mutants) > 100
    for mutant in mutants:
        changed = mutant.tree()
        compile(changed, str(FILE), "exec")
        assert ast.unparse(changed) != source, mutant.text


def test_messages_and_assertions_and_types_stay_as_they_are():
    texts = [mutant.text for mutant in mutants_of(FILE)]
    assert not [text for text in texts if ": raise:" not in text and "Refusal(" in text]
    assert {text.split(": ")[1] for text in texts} >= {"comparison", "condition", "raise", "constant", "return", "and/or", "arithmetic"}


def mutant_of(text):
    (found,) = (mutant for mutant in mutants_of(FILE) if mutant.text.endswith(text))
    return found


def test_a_function_is_replaced_where_it_is():
    node = Node.__new__(Node)
    node.label = "n"
    functions = mutate.functions_of([FILE])[str(FILE)]
    codes = [(function, function.__code__) for function in functions]
    assert len(codes) > 10
    try:
        with pytest.raises(ValueError, match="an axis of a value of rank 3"):
            placing.own_axis(node, 3, 3)
        mutate.put_in_place(mutant_of("own_axis: condition: not -rank <= axis < rank -> False"), functions)
        assert placing.own_axis(node, 3, 3) == 0
    finally:
        for function, code in codes:
            function.__code__ = code


def test_a_constant_is_replaced_for_all_who_read_it(monkeypatch):
    for module in [each for each in sys.modules.values() if hasattr(each, "FIRST_BROADCASTING_OPSET")]:
        monkeypatch.setattr(module, "FIRST_BROADCASTING_OPSET", module.FIRST_BROADCASTING_OPSET)
    mutate.put_in_place(next(each for each in mutants_of(FILE) if each.text.endswith(": constant: 7 -> 8")), [])
    assert (placing.FIRST_BROADCASTING_OPSET, elementwise.FIRST_BROADCASTING_OPSET) == (8, 8)
