"""What helps to test code that builds on tierstore."""
