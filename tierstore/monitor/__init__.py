"""Looking on: everything here reads events and counters, and changes nothing."""
