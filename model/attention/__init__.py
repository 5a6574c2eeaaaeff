"""Attention and what carries it: one door (attend), its implementations, caches and memory."""
