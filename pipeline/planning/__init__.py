"""Bytes and traffic of a run by formula, before anything runs."""
