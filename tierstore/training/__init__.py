"""Training over a store: what a hand-written PyTorch loop needs beside the store itself."""
