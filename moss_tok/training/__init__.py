"""Training: losses, train state, the jitted step, checkpoints, the loop."""
