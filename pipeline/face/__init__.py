"""Hugging Face: LongMem as a model that generates, memory as a thing, and a page that shows what was read."""
