"""Training data and queries: examples by number, batches, how they are collated, sampled and read from columns."""
