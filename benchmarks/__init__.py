"""Benchmarks of wherefrom: speed against peers and the physical limit, accuracy against retraining. See README.md."""
