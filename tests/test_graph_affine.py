"""The affine that travels through a graph: what each of its methods gives, as numbers."""

import numpy as np
import pytest

from fastbn.graph.ops.affine import Affine

GIVEN = Affine(np.array([2.0, -4.0, 0.5]), np.array([1.0, -3.0, 0.0]), 1, 4, np.array([5.0, 6.0, 7.0]))
NUMBER = Affine(np.array([2.0]), np.array([-3.0]), None, 2)


def parts(affine):
    return affine.scale.tolist(), affine.shift.tolist(), affine.axis, affine.rank, affine.abs_terms.tolist()


def test_the_size_of_the_terms_is_that_of_the_shift_where_it_is_not_given():
    assert parts(Affine(np.ones(2), np.array([-1.5, 2.0]), 0)) == ([1, 1], [-1.5, 2], 0, 0, [1.5, 2])
    assert GIVEN.abs_terms.tolist() == [5, 6, 7]


def test_whether_it_scales_and_shifts():
    one, zero = np.ones(2), np.zeros(2)
    some = [Affine(one, zero, 1), Affine(np.array([1.0, 2]), zero, 1), Affine(one, np.array([0.0, 1]), 1), GIVEN]
    assert [(affine.scales, affine.shifts) for affine in some] == [(False, False), (True, False), (False, True), (True, True)]
    assert (GIVEN.channels, NUMBER.channels) == (3, 1)


def test_along_another_axis_it_no_longer_demands_a_rank():
    assert parts(GIVEN.at(2)) == ([2, -4, 0.5], [1, -3, 0], 2, 0, [5, 6, 7])
    assert NUMBER.at(2) is NUMBER


def test_channels_are_picked():
    assert parts(GIVEN.picked(np.array([2, 0]), 0)) == ([0.5, 2], [0, 1], 0, 0, [7, 5])


def test_the_inverse_gives_back_what_went_in():
    inverse, x = GIVEN.inverse(), np.array([3.0, 5.0, -7.0])
    np.testing.assert_allclose(inverse.scale * (GIVEN.scale * x + GIVEN.shift) + inverse.shift, x)
    assert (inverse.axis, inverse.rank, inverse.abs_terms.tolist()) == (1, 4, [2.5, 1.5, 14])


def test_its_parts():
    assert parts(GIVEN.negated_shift()) == ([2, -4, 0.5], [-1, 3, 0], 1, 4, [5, 6, 7])
    assert parts(GIVEN.scale_only()) == ([2, -4, 0.5], [0, 0, 0], 1, 4, [0, 0, 0])


def test_one_number_is_repeated_and_channels_are_not():
    assert [part.tolist() for part in NUMBER.along(3)] == [[2, 2, 2], [-3, -3, -3], [3, 3, 3]]
    assert [part.tolist() for part in GIVEN.along(3)] == [[2, -4, 0.5], [1, -3, 0], [5, 6, 7]]


@pytest.mark.parametrize(
    ("axis", "rank", "shape"), [(1, 4, (3, 1, 1)), (0, 1, (3,)), (0, 3, (3, 1, 1)), (-1, 4, (3,)), (-2, None, (3, 1)), (-3, 3, (3, 1, 1))]
)
def test_the_shape_broadcasts_along_the_axis(axis, rank, shape):
    affine = Affine(GIVEN.scale, GIVEN.shift, axis)
    assert [part.shape for part in affine.shaped(rank)] == [shape] * 3
    assert [part.shape for part in NUMBER.shaped(rank)] == [()] * 3


def test_what_is_equal():
    other = [
        Affine(GIVEN.scale, GIVEN.shift, 2),
        Affine(GIVEN.scale, GIVEN.shift + 1, GIVEN.axis),
        Affine(GIVEN.scale + 1, GIVEN.shift, GIVEN.axis),
    ]
    assert GIVEN.equals(Affine(GIVEN.scale.copy(), GIVEN.shift.copy(), GIVEN.axis))
    assert not any(GIVEN.equals(each) for each in other)
