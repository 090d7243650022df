"""Arnoldi (Schioppa et al. 2022): eigenvalue estimates, and finding relabelled images by self-influence."""
