"""Implementations of the two operations; all equal `wsbcn_mm.reference`, and differ in speed only."""
