"""Verification: parity of one fold, and of a whole model."""
