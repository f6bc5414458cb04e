"""nnx.Modules only. They know nothing of checkpoints, data or devices; images and ids go in, arrays come out."""
