# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 models from GGUF files, in JAX."""
