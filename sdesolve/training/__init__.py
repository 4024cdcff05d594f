"""Training of scores: objectives, times, batches, checkpoints, and the loop."""
