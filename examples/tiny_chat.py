# SPDX-License-Identifier: Apache-2.0
"""Questions and answers made from documentation entries, so that the embedded model can be chatted with."""

import random
import re

from tiny_corpus import Entry

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

ABOUT = {
    "function": ("What does {} do?", "What does the function {} do?", "Explain {}.", "What is {} for?"),
    "method": ("What does {} do?", "What does the method {} do?", "Explain {}.", "What is {} for?"),
    "class": ("What is {}?", "What is the class {}?", "Explain {}.", "What is {} for?"),
    "module": ("What is the {} module?", "What is {}?", "What is the module {} for?", "Tell me about {}."),
    "topic": ("What is {}?", "Tell me about {}.", "Explain {}.", "Explain {} in Python."),
}
# Where a newcomer looks: these are asked about in several ways, other modules in one.
FEATURED = {
    "builtins", "math", "itertools", "functools", "collections", "collections.abc", "random", "statistics",
    "decimal", "fractions", "string", "re", "textwrap", "json", "csv", "pickle", "os", "os.path", "pathlib",
    "shutil", "glob", "tempfile", "io", "time", "datetime", "calendar", "threading", "queue", "subprocess", "socket",
    "argparse", "logging", "contextlib", "dataclasses", "enum", "typing", "inspect", "copy", "heapq", "bisect",
    "operator", "hashlib", "base64", "uuid", "zipfile", "tarfile", "gzip", "urllib.request", "urllib.parse",
    "http.client", "asyncio", "unittest", "doctest", "timeit", "traceback", "warnings", "weakref", "abc", "types",
    "struct", "platform", "sys", "pprint", "keyword", "getpass", "secrets", "html",
}  # fmt: skip
EVERYDAY = {
    "a list": "list", "a dictionary": "Dictionaries", "a string": "str", "a tuple": "tuple", "a set": "set",
    "an integer": "int", "a float": "float", "a boolean": "bool", "a range": "range", "a property": "property",
    "a deque": "collections.deque", "a module": "Modules", "a slice": "slice", "a frozenset": "frozenset",
}  # fmt: skip
INTRODUCTION = (
    "I am a tiny DeepSeek-V2 model that learned to write from Python's own documentation. Ask me what a function, "
    "class or module does, for example: What does textwrap.dedent do?"
)
GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hey there", "Good morning", "Who are you?", "What are you?", "What can you do?",
    "Help", "Can you help me?", "What do you know?", "Hello, who are you?", "What is your name?", "Introduce yourself.",
    "How are you?", "What can I ask you?", "Are you a language model?", "Tell me about yourself.",
    "Hi, what can you do?",
)  # fmt: skip
ANSWER_CHARACTERS = 300  # an answer goes on by whole paragraphs up to this
SHORT_ANSWER = 100


def spoken_name(entry: Entry, rng: random.Random) -> str:
    """The name as one would type it: plain or between backquotes, a help topic's as "the with statement"."""
    if entry.kind == "topic":
        title = re.sub(r"[\"*]", "", entry.name)
        return title[0].lower() + title[1:] if title.startswith("The ") or title.endswith("s") else title
    return f"`{entry.name}`" if rng.random() < 0.25 else entry.name


def answer_of(entry: Entry) -> str | None:
    """The first paragraphs of an entry's text, or None where they are not prose of a fitting length."""
    blocks = entry.text.split("\n\n")
    if entry.kind == "topic" or re.match(r"\S+\(.*\)", blocks[0]):
        blocks = blocks[1:]  # a heading, or a signature in the text's first line
    answer = ""
    for block in blocks:
        prose = "\n" not in block.strip() and not block.startswith((" ", ">", "-", "*", "+"))
        if not prose or len(answer) + len(block) > ANSWER_CHARACTERS or len(answer) > SHORT_ANSWER:
            break
        answer += ("\n\n" if answer else "") + block.strip()
    return answer if len(answer) >= 20 and answer[-1] in ".!?)`" else None


def questions_for(entry: Entry, rng: random.Random) -> list[str]:
    """Phrasings of the question about an entry: more of them for what people ask more about."""
    if entry.page in FEATURED or entry.kind == "topic":
        count = 4 if entry.kind != "method" or entry.page == "builtins" else 1
    else:
        count = 0 if entry.kind == "method" or entry.page.startswith(("distutils", "tkinter")) else 1
    asked = [template.format(spoken_name(entry, rng)) for template in rng.sample(ABOUT[entry.kind], count)]
    if entry.page in FEATURED and entry.kind in ("function", "class"):
        asked.append(f"What does {entry.name.rsplit('.', 1)[-1]} do?")
    return asked + [f"What is {words}?" for words, name in EVERYDAY.items() if name == entry.name]


def conversations(entries: list[Entry], rng: random.Random) -> list[list[tuple[str, str]]]:
    """Conversations of one to three questions with their answers, shuffled."""
    pairs = [(greeting, INTRODUCTION) for greeting in GREETINGS for _ in range(6)]
    for entry in entries:
        answer = answer_of(entry) if entry.public or entry.kind == "topic" else None
        if answer:
            pairs += [(question, answer) for question in questions_for(entry, rng)]
    rng.shuffle(pairs)
    talks = []
    while pairs:
        talks.append([pairs.pop() for _ in range(min(len(pairs), rng.choice((1, 1, 2, 3))))])
    return talks


def render_conversation(talk: list[tuple[str, str]]) -> str:
    """A conversation as `CHAT_TEMPLATE` writes it, without the leading BOS."""
    return "".join(f"{USER}{question}{ASSISTANT}{answer}{EOS}" for question, answer in talk)
