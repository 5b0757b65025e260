"""Bugs planted in copies of the package, and the proof that the suites catch each."""
