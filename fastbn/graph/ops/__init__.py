"""What each operator does with an affine, one row per operator."""
