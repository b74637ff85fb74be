"""The affine that travels through a graph: what each of its methods gives, as numbers."""

import numpy as np
import pytest

from fastbn.graph.ops.affine import Affine, agreed

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


def wanted(scale, free=None, axis=1):
    """Return an affine of three channels, or of one number, of which some channels are free."""
    scale = np.atleast_1d(np.asarray(scale, np.float64))
    return Affine(scale, scale + 1, axis, 0, scale + 2, None if free is None else np.array(free))


def test_what_several_want_of_a_value():
    one = wanted([2, 3, 4])
    assert agreed([one]) is one
    assert parts(agreed([one, wanted([2, 3, 4])])) == parts(one)
    assert agreed([one, wanted([2, 3, 5])]) is None
    assert agreed([one, wanted([2, 3, 4], axis=2)]) is None
    assert agreed([one, wanted([2, 3])]) is None
    assert agreed([wanted([2, 2, 2]), wanted(2, axis=None)]).axis == 1
    assert agreed([wanted(2, axis=None), wanted([2, 2, 3])]) is None
    shifted = Affine(one.scale, one.shift + 1, 1)
    assert agreed([one, shifted]) is None


def test_a_channel_that_one_does_not_read_is_for_the_others_to_say():
    first, second = wanted([2, 3, 9], [False, False, True]), wanted([9, 3, 4], [True, False, False])
    both = agreed([first, second])
    assert parts(both) == ([2, 3, 4], [3, 4, 5], 1, 0, [4, 5, 6])
    assert both.free.tolist() == [False] * 3
    assert agreed([first, wanted([9, 5, 9], [True, False, True])]) is None
    assert agreed([first, wanted([7, 7, 7], [True, True, True])]).free.tolist() == [False, False, True]
    assert agreed([first, second, wanted([2, 3, 5])]) is None


def test_free_channels_follow_the_others():
    affine = wanted([2, 3, 9], [False, False, True])
    assert affine.picked(np.array([2, 0]), 0).free.tolist() == [True, False]
    for each in (affine.at(2), affine.scale_only(), affine.negated_shift(), affine.share(2)):
        assert each.free.tolist() == [False, False, True]
    assert parts(affine.share(2)) == ([2, 3, 9], [1.5, 2, 5], 1, 0, [2, 2.5, 5.5])
