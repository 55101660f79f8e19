"""Checkpoints: what survives a restart, and the folder that holds it."""
