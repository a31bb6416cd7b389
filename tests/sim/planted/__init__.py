"""Faults planted into copies of the product, to see that the simulator can fail."""
