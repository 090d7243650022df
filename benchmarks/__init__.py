"""Benchmarks of whence: speed against peers and the physical limit, accuracy against retraining. See README.md."""
