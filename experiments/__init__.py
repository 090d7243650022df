"""One folder per paper: what it claims, run again at the scale named in its README."""
