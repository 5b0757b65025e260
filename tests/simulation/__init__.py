"""Deterministic simulation: the real store on a simulated clock, simulated links and a seeded order of everything that may interleave."""
