"""The memory bank: storing, exact search, and attention over what was found. Plain torch."""
