"""What a checkpoint costs, beside torch's own ways. Run it by ``python -m benchmarks.checkpoint``."""
