# SPDX-License-Identifier: Apache-2.0
"""What the commands of `ktx-jax` do; each module is imported when its command runs."""
