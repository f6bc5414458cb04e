"""Training: one loop, its state, checkpoints and sharding, and one file for each stage."""
