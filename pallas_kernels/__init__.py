# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels for GPUs: plain functions of arrays, independent of ktx_jax."""
