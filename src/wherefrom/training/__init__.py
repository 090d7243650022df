"""What a training run leaves behind: trajectories of checkpoints."""
