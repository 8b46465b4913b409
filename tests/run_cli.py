# SPDX-License-Identifier: Apache-2.0
"""The command line for a process of a run, which may stand still for long on machines that run tests."""

from functools import partial

from ktx_jax import distributed
from ktx_jax.cli import main

if __name__ == "__main__":
    distributed.initialize = partial(distributed.initialize, heartbeat_seconds=600)  # type: ignore[assignment]
    main()
