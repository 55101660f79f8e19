"""LongMem on DeepSpeed: a frozen backbone, a trained SideNet, and a memory bank that both share."""
