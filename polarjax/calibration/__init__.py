"""Adapters from text: routers, budgets, recovery, and what they may promise."""
