"""Bit-width selection: costs, budgets, policies, searchers."""
