"""A compiler that does not optimise, for tests that compile for longer than they run."""

from functools import partial

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
jit = partial(jax.jit, compiler_options=OPTIONS)

ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""The same for all programs of a process that is started with it, on one device."""
