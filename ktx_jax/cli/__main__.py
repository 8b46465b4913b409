# SPDX-License-Identifier: Apache-2.0
"""`python -m ktx_jax.cli`."""

from ktx_jax.cli import main

main()
