"""The pure core: facts and desired state in, decisions out. No clock, no I/O, no randomness."""
