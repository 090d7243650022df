"""The model that is attributed: its task, its problem, and how per-sample gradients are captured and checked."""
