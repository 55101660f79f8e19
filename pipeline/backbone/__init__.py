"""The frozen backbone: family table, taps, memory keys and values."""
