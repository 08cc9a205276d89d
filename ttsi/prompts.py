"""Every word the study says to a model. All prompts about one tool set open with the same system turn."""

from __future__ import annotations

import hashlib
import json

from ttsi.engines.base import Prompt
from ttsi.types import Message, Query, Tool

OPENING = '<tool_call>[{"name": "'
"""How every well-formed answer begins; H scores the tools' names behind it."""

_SYSTEM = """\
You are an assistant that answers requests by calling functions. These functions are available:
<tools>
{tools}
</tools>
Answer with the calls that fulfil the request and nothing else, as a JSON list between tags:
<tool_call>[{{"name": <function-name>, "arguments": <args-json-object>}}]</tool_call>
Use only parameters that the function declares, with values of the declared types taken from the request."""

# The answer is asked for without tags: under the paper's repetition penalty the model drops them anyway.
_SYNTHESIS = """\
A user asked:
{question}

Write a similar question that another user could ask: plain English, same function, different details. \
Then write its answer.
Use exactly this form:
Question: <the new question>
Answer: [{{"name": <function-name>, "arguments": <args-json-object>}}]"""

_SHOT = """\
Here is an example of a request and its answer{note}.
Request: {question}
Answer: {answer}

Now answer this request.
{request}"""


QUESTION, ANSWER = "Question:", "Answer:"
"""What stands before the two parts of a synthetic example."""


def tool_line(tool: Tool) -> str:
    """One tool as one line of JSON."""
    schema = {k: tool.parameters[k] for k in ("type", "properties", "required") if k in tool.parameters}
    entry = {"name": tool.name, "description": tool.description, "parameters": {**schema, **tool.parameters}}
    return json.dumps(entry, ensure_ascii=False)


def system(tools: tuple[Tool, ...]) -> str:
    """The system turn that all prompts about these tools, in this order, share."""
    return _SYSTEM.format(tools="\n".join(map(tool_line, tools)))


def act(query: Query) -> Prompt:
    """The prompt that asks for the answer."""
    return Prompt(system(query.tools), query.messages)


def transcript(query: Query) -> str:
    """The seed as plain text: the question itself, or the whole conversation with its speakers."""
    if len(query.messages) == 1:
        return query.messages[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in query.messages if m.content)


def synthesis(query: Query) -> Prompt:
    """The prompt that asks for a similar request with its answer. Paper: section 3.2, figure 6."""
    return Prompt(system(query.tools), (Message("user", _SYNTHESIS.format(question=transcript(query))),))


def example(tools: tuple[Tool, ...], question: str) -> Prompt:
    """The prompt of a training example: the form of `act`, with the synthetic question."""
    return Prompt(system(tools), (Message("user", question),))


def with_shot(query: Query, question: str, answer: str, tools: tuple[Tool, ...] = ()) -> Prompt:
    """The act prompt with one worked example before the last user turn's request.

    `tools`: the example's own tools where they differ from the query's.
    """
    note = " that used other functions:\n" + "\n".join(map(tool_line, tools)) if tools else ""
    last = max(i for i, m in enumerate(query.messages) if m.role == "user")
    request = query.messages[last].content
    shown = Message("user", _SHOT.format(note=note, question=question, answer=answer, request=request))
    return Prompt(system(query.tools), (*query.messages[:last], shown, *query.messages[last + 1 :]))


def version() -> str:
    """A hash of every text above: results of other words are other results."""
    text = "\x1f".join([OPENING, _SYSTEM, _SYNTHESIS, _SHOT])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
