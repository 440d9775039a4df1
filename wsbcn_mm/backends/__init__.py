"""Implementations of the two operations: equal to `wsbcn_mm.reference`, different in speed."""
