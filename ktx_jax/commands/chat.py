# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax chat`: a conversation at the terminal."""

import contextlib
import time
from typing import Any

from ktx_jax.commands.common import ModelOptions, load_llm, notes, receive, say
from ktx_jax.errors import KtxError

HELP = """\
/reset   forget the conversation
/help    this list
/exit    leave (Ctrl-D too)
Ctrl-C stops a reply; the conversation goes on with what was said."""


def chat(options: ModelOptions, system: str | None, sampling: dict[str, Any]) -> int:
    """Talks until the user leaves; returns the exit code."""
    from ktx_jax.engine.requests import SamplingParams

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    params = SamplingParams(**sampling)
    llm = load_llm(options)
    if llm.chat_template is None:
        raise KtxError(f"{options.model} has no chat template: give one with --chat-template FILE, or use generate")
    notes.print(f"{options.model.name}: loaded in {llm.load_seconds:.1f} s. /help lists the commands.", style="dim")
    Conversation(llm, params, system).run()
    return 0


class Conversation:
    """A chat session: what was said, and what to do with the next line."""

    def __init__(self, llm: Any, params: Any, system: str | None):
        self._llm, self._params = llm, params
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._start)

    def run(self) -> None:
        """Reads lines until /exit or the end of the input."""
        while True:
            try:
                line = input(">>> ").strip()
            except KeyboardInterrupt:
                say("\n")
                notes.print("/exit or Ctrl-D leaves.", style="dim")
                continue
            except EOFError:
                say("\n")
                return
            if line == "/exit":
                return
            if line.startswith("/"):
                self.obey(line)
            elif line:
                self.answer(line)

    def obey(self, command: str) -> None:
        """Carries out a command other than /exit."""
        if command == "/reset":
            self.messages = list(self._start)
            notes.print("The conversation is forgotten.", style="dim")
        elif command == "/help":
            notes.print(HELP, style="dim")
        else:
            notes.print(f"There is no command {command}.\n{HELP}", style="dim", markup=False)

    def answer(self, line: str) -> None:
        """Prints the reply to `line`, as far as it is let. A line that cannot be answered is not remembered."""
        self.messages.append({"role": "user", "content": line})
        begun = time.perf_counter()
        try:
            reply = receive(self._llm.stream_chat(self.messages, self._params), say, begun)
        except KtxError as error:
            self.messages.pop()
            notes.print(f"{error}\n/reset makes room for a new conversation.", style="red", markup=False)
            return
        say("\n")
        self.messages.append({"role": "assistant", "content": reply.text})
        ending = {"length": "; cut at --max-tokens or the context", None: "; stopped"}.get(reply.finish_reason, "")
        notes.print(reply.summary() + ending, style="dim")
