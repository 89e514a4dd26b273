"""Choosing bit-widths: cost, budget, policy, searchers."""
