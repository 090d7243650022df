"""Per-sample gradients of each block of parameters, kept factored, and the contractions over them."""
