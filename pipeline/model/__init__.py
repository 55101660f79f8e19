"""LongMem as one thing: backbone, SideNet and memory."""
