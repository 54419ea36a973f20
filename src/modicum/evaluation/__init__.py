"""Accuracy against measured bytes: grids of models, policies, budgets, tasks and lengths."""
