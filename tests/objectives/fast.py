"""`jit` for tests that compile much: quicker still than with the flags that all tests have (conftest.py)."""

import functools

import jax

# The older emitters compile in half the time; jaxlib 0.12 has them no more.
OLDER = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {}

jit = functools.partial(jax.jit, compiler_options=OLDER)
