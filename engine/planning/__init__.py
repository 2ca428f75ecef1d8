"""Arithmetic before the work: memory, time, windows, step caches."""
