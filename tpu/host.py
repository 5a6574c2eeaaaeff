"""What this host can do and what an entry point sets before work starts: allocator, fast number formats, peak rate.

Nothing here imports jax at module level, so that settings can be made before jax starts its threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import platform
import resource
import time
from collections.abc import Callable

from tpu.errors import UserError

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_GOOGLE_PCI_VENDOR = "0x1ae0"
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of returning it to the kernel; call before any thread starts.

    A training step on CPU allocates and frees hundreds of megabytes; mapping and faulting them anew takes time in
    every step. `FreedMemory` bounds what is kept (docs/performance.md). Returns False where glibc is absent.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    if not all(libc.mallopt(option, value) == 1 for option, value in settings):
        return False
    _reserve_heap(libc)
    return True


def _reserve_heap(libc: ctypes.CDLL) -> None:
    """Extends the heap that is kept, in huge pages: their faults are 512 times fewer. Nothing is touched."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := libc.malloc(size):
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, block + size - start, _MADV_HUGEPAGE)
        libc.free(block)


def give_back_freed_memory() -> None:
    """Returns to the kernel what glibc holds freed; does nothing where glibc is absent."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        _reserve_heap(libc)


class FreedMemory:
    """Bounds what `keep_freed_memory` keeps between the steps of a run.

    The temporaries of a step are one block. Where something small and lasting lands in the room that it left, the next
    block finds none there, and the heap holds both. So what is free is given back after the first step, when the
    compiler has done its work too; after other work; and when the process has grown by a quarter.

    Args:
      resident: the memory that the process holds, in bytes.
      give_back: returns to the kernel what of it is free.
    """

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        give_back: Callable[[], None] = give_back_freed_memory,
    ):
        self._resident, self._give_back = resident or resident_bytes, give_back
        self._usual, self._given_back = 0, False

    def after_step(self, other_work: bool = False) -> None:
        """Call between steps; `other_work`: an evaluation or a save came after the last."""
        resident = self._resident()
        if self._given_back and not other_work:  # The step that has ended took from the kernel what it needs.
            self._usual, self._given_back = resident, False
        elif other_work or resident > 1.25 * self._usual:
            self._give_back()
            self._given_back = True


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 matrix instructions that XLA uses (AVX512-BF16 or AMX)."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def fast_dtype(backend: str) -> str:
    """The number format that `compute_dtype="auto"` stands for on a back end ("cpu", "gpu" or "tpu")."""
    if backend == "gpu":
        import jax

        # Before Ampere (8.0) NVIDIA's GPUs multiply no bfloat16, and cuDNN has no flash attention for them.
        capability = str(getattr(jax.devices("gpu")[0], "compute_capability", ""))
        return "float32" if capability[:2] in ("6.", "7.") else "bfloat16"
    return "bfloat16" if backend != "cpu" or cpu_multiplies_bfloat16() else "float32"


def start_backend(compilation_cache: bool = True) -> str:
    """Starts jax and returns its back end's name, with compiled programs kept in `$FOURSIGHT_CACHE/compiled`.

    They are not kept where that cannot be written. Raises UserError where the platforms of JAX_PLATFORMS cannot start.
    """
    import jax

    # libtpu would say the same in six lines of its own.
    if os.environ.get("JAX_PLATFORMS") == "tpu" and not has_tpu_chips():
        raise UserError("JAX_PLATFORMS=tpu: this machine has no TPU; give cpu, or leave it out")
    if compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(UserError, OSError):
            compiled = cache_dir() / "compiled"
            compiled.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(compiled))
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        why = (str(error).splitlines() or ["it gives no reason"])[0]
        given = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX_PLATFORMS={given}: jax cannot start there ({why}); give cpu, or what there is") from error


def has_tpu_chips() -> bool:
    """Whether this machine has TPUs, by its PCI bus."""
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text(encoding="utf-8").strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)


def start_compiler_options(platform: str) -> dict[str, int] | None:
    """Options with which what draws weights is compiled for a platform; None for XLA's own choice.

    It runs once. On CPU half the optimisation takes a third of the time to compile, and draws as fast.
    """
    import jax

    if platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):  # which leaves even less to do
        return None
    return {"xla_backend_optimization_level": 1}


def step_compiler_options(platform: str) -> dict[str, str | bool] | None:
    """Options with which a training step is compiled for a platform ("cpu", "gpu", "tpu"); None for XLA's own choice.

    On CPU two of XLA's habits hold values of the forward pass for the backward pass that nobody asked it to hold. It
    removes `optimization_barrier` before it merges equal expressions, so that what `jax.checkpoint` means to compute
    again is stored after all; and it orders operations for parallelism, not for memory (openxla/xla issue 35719).
    """
    if platform != "cpu":
        return None
    return {
        "xla_disable_hlo_passes": "cse_barrier_expander",
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
    }


def cache_dir() -> pathlib.Path:
    """Where tokens, trained tokenizers and compiled programs are kept between runs.

    $FOURSIGHT_CACHE, else ~/.cache/foursight. Raises UserError where there is no home to find it in.
    """
    folder = os.path.expanduser(os.environ.get("FOURSIGHT_CACHE") or "~/.cache/foursight")
    if folder == "~" or folder.startswith("~/"):
        raise UserError("there is no home directory to keep tokens in; name a directory in FOURSIGHT_CACHE")
    return pathlib.Path(folder)


@functools.cache
def measured_matmul_rate(dtype: str, size: int = 0, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a square matrix product on one device, best of several.

    Measured once a process.

    Args:
      dtype: of the operands; float32 is accumulated and returned.
      size: rows of the matrices; 0 chooses 1,024 where few cores reach their peak, 2,048 on other CPUs, else 8,192.
      seconds: how long to go on measuring.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = 1024 if (os.cpu_count() or 1) <= 8 else 2048
    size = size or (on_cpu if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_host_bytes() -> int:
    """The most resident memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not say."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def free_bytes() -> int:
    """Memory that is free where arrays lie: on the first device, or this host's, within the limit of its control group.

    0 where the system does not say.
    """
    import jax

    if statistics := jax.local_devices()[0].memory_stats():
        return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = pathlib.Path("/sys/fs/cgroup")
        found.append(
            int((group / "memory.max").read_text(encoding="utf-8"))
            - int((group / "memory.current").read_text(encoding="utf-8"))
        )
    return min(found, default=0)


def device_bytes(peak: bool = False) -> int:
    """Memory in use on the first device (`peak`: the most so far); 0 where the platform does not say, as on CPU."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use" if peak else "bytes_in_use", 0)
