# SPDX-License-Identifier: Apache-2.0
"""Compiling a plan's steps for GPUs that are not here, and reading what the compiler made of them."""
