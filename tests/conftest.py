"""Strict settings for every test: eight CPU devices, no network, no silent rank promotion, a compilation cache."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
if DATA.is_dir():
    os.environ.setdefault("FMDA_DATA", str(DATA))
# in the environment, so that the processes which tests start share the cache of the workers
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402

from fmda.environment import keep_freed_memory  # noqa: E402

keep_freed_memory()

# tests compile much and compute little: slower programs that compile faster, in the processes that tests start too
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
flags += ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones end on a flag that they do not know
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """The demo takes longest: it comes first, so that the others run beside it."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")
