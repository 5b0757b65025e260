"""Carrying out what the scheduler decides: copies between arenas, and the engine that ties them to files and callers."""
