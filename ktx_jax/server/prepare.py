# SPDX-License-Identifier: Apache-2.0
"""From requests to what the engine is asked: prompts, sampling, grammars.

It runs in threads: a long prompt or a large schema may not stall the others.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ktx_jax.chat import template_names
from ktx_jax.engine.grammar import Grammar
from ktx_jax.engine.requests import SamplingParams
from ktx_jax.errors import KtxError
from ktx_jax.server.answer import Ask
from ktx_jax.server.errors import ApiError
from ktx_jax.server.schema import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    Sampling,
    Tokenize,
)
from ktx_jax.server.settings import MAX_SCHEMA
from ktx_jax.server.tools import call_grammar, described, told

DEFAULT_COMPLETION = 16  # tokens, as OpenAI's /v1/completions has it


def chat_asks(llm: Any, request: ChatRequest) -> list[Ask]:
    """What a chat request asks of the engine, a reply each.

    Raises:
      ApiError: 400, the field named.
    """
    tools = _tools(request)
    prompt = chat_prompt(llm, request.messages, tools)
    room = _room(llm, prompt, "messages")
    wanted = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    params = sampling_params(
        llm,
        request,
        max_tokens=min(wanted or room, room),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=_grammar(llm, request, tools),
    )
    asks = [Ask(prompt, params, bool(tools), request.parallel_tool_calls is not False)]
    return [replace(asks[0], params=one) for one in _choices(params, request.n)]


def completion_asks(llm: Any, request: CompletionRequest) -> tuple[list[list[int]], list[Ask]]:
    """The prompts of a completion request, and what it asks of the engine: `n` replies to each, or none.

    Raises:
      ApiError: 400, the field named.
    """
    try:
        prompts = [llm.encode(prompt) for prompt in request.prompts()]
    except KtxError as error:
        raise ApiError(400, str(error), param="prompt") from error
    wanted = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
    asks = []
    for prompt in prompts:
        _check_ids(llm, prompt, "prompt")
        room = _room(llm, prompt, "prompt", least=min(wanted, 1))
        if wanted:
            params = sampling_params(
                llm, request, max_tokens=min(wanted, room), logprobs=request.logprobs, grammar=None
            )
            asks += [Ask(prompt, one) for one in _choices(params, request.n)]
    return prompts, asks


def tokens(llm: Any, request: Tokenize) -> list[int]:
    """The token ids that `/tokenize` asks for."""
    if request.messages is not None:
        return chat_prompt(llm, request.messages, ())
    try:
        return llm.tokenizer.encode(request.prompt, request.add_special_tokens)
    except KtxError as error:
        raise ApiError(400, str(error), param="prompt") from error


def chat_prompt(llm: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
    """The token ids of a conversation up to where the reply begins."""
    plain = [turn for message in messages for turn in _turns(message)]
    known = template_names(llm.chat_template)
    if tools and "tools" not in known:
        plain = told(plain, described(tools))
    if any(message.get("tool_calls") or message["role"] == "tool" for message in plain) and "tool_calls" not in known:
        raise ApiError(400, "the model's chat template cannot write calls of tools", param="messages")
    try:
        return llm.encode_chat(plain, tools=list(tools) or None)
    except KtxError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error


def sampling_params(
    llm: Any, request: Sampling, *, max_tokens: int, logprobs: int | None, grammar: Grammar | None
) -> SamplingParams:
    """How to draw; what a request leaves open is as the model's makers advise."""
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    given = {name: value for name in (*names, "ignore_eos") if (value := getattr(request, name)) is not None}
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    _check_ids(llm, bias, "logit_bias")
    _check_ids(llm, request.stop_token_ids or (), "stop_token_ids")
    try:
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            seed=None if request.seed is None else request.seed % 2**64,
            stop=request.texts_to_stop(),
            logprobs=logprobs,
            logit_bias=bias,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            grammar=grammar,
        )
    except KtxError as error:
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0], code="invalid_value") from error


def _choices(params: SamplingParams, n: int | None) -> list[SamplingParams]:
    """`params` for each of n replies to a prompt: a seed gives n different ones, the same each time."""
    if params.seed is None:
        return [params] * (n or 1)
    return [replace(params, seed=(params.seed + i) % 2**64) for i in range(n or 1)]


def _check_ids(llm: Any, ids: Iterable[int], param: str) -> None:
    size = llm.tokenizer.vocab_size
    if bad := [token for token in ids if token >= size]:
        raise ApiError(400, f"token id {bad[0]} is outside the vocabulary of {size}", param=param, code="invalid_value")


def _room(llm: Any, prompt: Sequence[int], param: str, least: int = 1) -> int:
    """How many tokens fit after the prompt."""
    if not prompt:
        raise ApiError(400, "the prompt is empty: give at least one token", param=param)
    room = llm.context - len(prompt)
    if room < least:
        raise ApiError(
            400, f"the prompt has {len(prompt)} tokens; the context holds {llm.context}, the reply included",
            param=param, code="context_length_exceeded",
        )  # fmt: skip
    return room


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools that this request may call."""
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in request.tools or ()]
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise ApiError(400, "two tools have the same name", param="tools")
    _check_schema(json.dumps(tools), "tools")
    if request.tool_choice == "none":
        return []
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ApiError(400, f"there is no tool {name!r} in tools", param="tool_choice")
    return tools


def _grammar(llm: Any, request: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> Grammar | None:
    wanted = request.response_format
    structured = isinstance(wanted, JsonObjectFormat | JsonSchemaFormat)
    forced = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    if tools and (forced or any(tool.function.strict for tool in request.tools or ())):
        if structured:
            raise ApiError(400, "a reply cannot be both calls of tools and JSON of a format", param="response_format")
        source = call_grammar(tools, llm.tokenizer, required=forced, parallel=request.parallel_tool_calls is not False)
        return _compiled(lambda: Grammar.from_lark(source, llm.tokenizer), "tools")
    if isinstance(wanted, JsonSchemaFormat):
        schema, param = wanted.json_schema.schema_, "response_format.json_schema.schema"
        _check_schema(json.dumps(schema), param)
        return _compiled(lambda: Grammar.from_json_schema(schema, llm.tokenizer), param)
    if structured:
        return _compiled(lambda: Grammar.json_object(llm.tokenizer), "response_format")
    return None


def _check_schema(text: str, param: str) -> None:
    if len(text) > MAX_SCHEMA:
        raise ApiError(400, f"the schema has {len(text)} characters; at most {MAX_SCHEMA} are taken", param=param)


def _compiled(make: Any, param: str) -> Grammar:
    try:
        return make()
    except KtxError as error:
        raise ApiError(400, str(error), param=param, code="invalid_schema") from error


def _turns(message: Any) -> list[dict[str, Any]]:
    """A message as chat templates know it. Text and calls are two turns: V2.5's template writes only one of them."""
    plain = message.model_dump(include={"role", "content", "tool_calls", "tool_call_id"}, exclude_none=True)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if not plain.get("tool_calls"):
        return [plain]
    text = plain.pop("content", None)
    return [*([{"role": "assistant", "content": text}] if text else []), {**plain, "content": None}]
