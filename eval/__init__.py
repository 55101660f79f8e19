"""Evaluation as the paper does it."""
