"""The engine of wangpd: everything the daemon does that is not HTTP.

Importing any module of this package costs nothing: torch, diffusers and numpy live in `engine.gpu`, which only the
generation process imports.
"""
