"""`jit` for tests that compile much: quicker still than with the flags that all tests have (conftest.py)."""

import functools

import jax

jit = functools.partial(
    jax.jit,
    # The older emitters compile in half the time.
    compiler_options={"xla_cpu_use_fusion_emitters": False},
)
