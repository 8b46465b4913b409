# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax serve`: a model behind the OpenAI API, Ollama's, and a chat page (extra `serve`)."""
