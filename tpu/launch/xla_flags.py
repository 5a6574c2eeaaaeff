"""XLA and libtpu flags per chip: one table, none where none has shown its worth.

The compilers choose well by themselves and their flags come and go (https://github.com/jax-ml/jax/issues/23107): a flag
that a release does not know aborts the process as it starts. So a flag stands here only with a reason, and every set is
compiled with in tests/tpu/launch. Sets that others use and that are left out, with what was seen of them,
are listed in docs/launch.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """One flag as it is written, and why it is set."""

    text: str
    reason: str


SETS: dict[str, tuple[Flag, ...]] = {
    "v4": (),
    "v5e": (),
    "v5p": (),
    "v6e": (),
    "v7x": (),
    "gpu": (
        Flag(
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "starts collectives early enough to run beside compute; the one flag that NVIDIA's own JAX images set "
            "(https://docs.nvidia.com/jax-toolbox/environment-variables)",
        ),
    ),
    "cpu": (),
}


def environment(chip: str, flags: str | None = None) -> dict[str, str]:
    """The environment variable with which processes on `chip` (a key of SETS) start; empty for no flags.

    flags: in place of the chip's set, separated by spaces; an empty string for none.
    """
    flags = " ".join(flag.text for flag in SETS[chip]) if flags is None else flags.strip()
    if not flags:
        return {}
    return {"XLA_FLAGS" if chip in ("gpu", "cpu") else "LIBTPU_INIT_ARGS": flags}
