"""`jit` for tests: the arrays are tiny, compiling is all the time there is."""

import functools

import jax

jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,  # the older emitters compile in half the time
    },
)
