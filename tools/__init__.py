"""What those who work on this repository start; users need none of it."""
