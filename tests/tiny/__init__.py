"""Tiny checkpoints of the catalogue's models, for tests that load and render for real."""
