"""Which affine goes where: the graph as it is after the plans so far, the search, the plans."""
