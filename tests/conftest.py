"""Eight simulated CPU devices for every test, set before jax is imported; and quick compilation, since the
programs of tests run for milliseconds: each is compiled once, by whichever process needs it first."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"
    # The older emitters compile in three quarters of the time; jaxlib 0.11 has them no more.
    + " --xla_cpu_use_fusion_emitters=false" * (metadata.version("jaxlib") < "0.11")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set for pytest-xdist's workers, who inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="clipjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# What jax keeps of thousands of programs is never garbage, and looking through it costs minutes in all.
gc.set_threshold(100_000, 50, 50)
