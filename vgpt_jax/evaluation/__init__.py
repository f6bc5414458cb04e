"""Metrics as pure functions, and the runner that averages them over the held-out part."""
