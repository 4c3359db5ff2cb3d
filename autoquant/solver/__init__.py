"""Choosing a plan: pure arithmetic over what was measured. Needs no torch."""
