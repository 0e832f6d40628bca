"""The training loop for any objective: train state, jitted step, checkpoints, logs."""
