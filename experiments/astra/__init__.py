"""ASTRA (Wang et al. 2025): its step without a sweep, figures 3 and 4, and a table of solvers, on small problems."""
