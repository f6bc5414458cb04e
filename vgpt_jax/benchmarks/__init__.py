"""Side-by-side timings with a peer, in one process each: ``python -m vgpt_jax.benchmarks.NAME``."""
