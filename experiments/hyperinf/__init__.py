"""HyperINF: convergence and time of Schulz's iteration, the synthetic experiments of the paper."""
