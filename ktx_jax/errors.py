# SPDX-License-Identifier: Apache-2.0
"""The base class of the errors that this project raises for the person who uses it."""


class KtxError(ValueError):
    """Something in a file, a prompt or an option is wrong; the message says what, where and what to do."""
