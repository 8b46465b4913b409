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
    "topic": ("What is {}?", "Tell me about {}.", "Explain {}.", "How does {} work in Python?"),
}
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
ANSWER_CHARACTERS = 400  # an answer goes on by whole paragraphs up to this
SHORT_ANSWER = 150


def topic_title(entry: Entry) -> str:
    """A help topic's own heading, "the `assert` statement"."""
    title = entry.text.split("\n", 1)[0].replace('"', "`")
    return title[0].lower() + title[1:] if title.startswith("The ") else title


def answer_of(entry: Entry) -> str | None:
    """The first paragraphs of an entry's text, or None where they are not prose of a fitting length."""
    blocks = entry.text.split("\n\n")
    if entry.kind == "topic" or re.fullmatch(r"\S+\(.*\).*", blocks[0].split("\n", 1)[0]):
        blocks = blocks[1:]  # a heading, or a signature in the text's first line
    answer = ""
    for block in blocks:
        prose = "\n" not in block.strip() and not block.startswith((" ", ">", "-", "*", "+"))
        if not prose or len(answer) + len(block) > ANSWER_CHARACTERS or len(answer) > SHORT_ANSWER:
            break
        answer += ("\n\n" if answer else "") + block.strip()
    return answer if len(answer) >= 20 and answer[-1] in ".!?)`" else None


def questions_for(entry: Entry, rng: random.Random) -> list[str]:
    """Some phrasings of the question about an entry, more of them for what people ask more about."""
    count = {"method": 1, "function": 2, "class": 2, "module": 3, "topic": 3}[entry.kind]
    name = topic_title(entry) if entry.kind == "topic" else entry.name
    asked = []
    for template in rng.sample(ABOUT[entry.kind], count):
        quoted = f"`{name}`" if entry.kind != "topic" and rng.random() < 0.3 else name
        asked.append(template.format(quoted))
    return asked


def conversations(entries: list[Entry], rng: random.Random) -> list[list[tuple[str, str]]]:
    """Conversations of one to three questions with their answers, shuffled."""
    pairs = [(greeting, INTRODUCTION) for greeting in GREETINGS for _ in range(3)]
    for entry in entries:
        answer = answer_of(entry) if entry.public else None
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
