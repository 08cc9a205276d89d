"""Every word that is said to a model. All prompts about one tool set open with the same system turn.

A layout is a way of putting the same question: `native` is ours, `paper` has the structure of the paper's own
test prompts, `template` leaves the tools to the model's chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from ttsi.calls import format_calls
from ttsi.engines.base import Prompt
from ttsi.types import Call, Layout, Message, Query, Tool

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

_PAPER = """\
You are an expert in calling functions. You answer a request with function calls and never with prose.

Rules:
- Call only functions of the list below, by their exact names.
- Give every required parameter, and no parameter that the function does not have.
- Take the values from the request, in the types that the parameters have.

Task:
1. Read the request and find out what is wanted.
2. Choose the function, or the functions, that do it.
3. Fill in their parameters.
4. Write the calls in the output format and nothing else.

Output format:
<tool_call>[{{"name": <function-name>, "arguments": <args-json-object>}}]</tool_call>

Functions:
{tools}"""

_PAPER_TOOL = """\
{number}. Name: {name}
   Description: {description}
   Parameters: {parameters}
   Required: {required}"""

_PAPER_CLOSING = {
    # 47 of its gold calls hold a year that no turn names.
    "apibank": "Answer with exactly one call, the next one in this conversation. The year is 2023.",
}
_TEMPLATE_OPENING = '<tool_call>\n{"name": "'

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


def opening(layout: Layout = "native") -> str:
    """How every well-formed answer begins under a layout, up to the first tool's name."""
    return _TEMPLATE_OPENING if layout == "template" else OPENING


def write(calls: Iterable[Call], layout: Layout = "native") -> str:
    """The calls as a layout asks for them: what an adapter is taught to write."""
    if layout != "template":
        return format_calls(calls)
    rows = (json.dumps({"name": c.name, "arguments": dict(c.arguments)}, ensure_ascii=False) for c in calls)
    return "\n".join(f"<tool_call>\n{row}\n</tool_call>" for row in rows)


def system(tools: tuple[Tool, ...], layout: Layout = "native", instructions: str = "") -> str:
    """The system turn that all prompts about these tools, in this order, share.

    instructions: words of one's own, its last line; `template` has no others.
    """
    return "\n".join(filter(None, [_system(tools, layout), instructions]))


def _system(tools: tuple[Tool, ...], layout: Layout) -> str:
    if layout == "template":
        return ""
    if layout == "native":
        return _SYSTEM.format(tools="\n".join(map(tool_line, tools)))
    blocks = [
        _PAPER_TOOL.format(
            number=i,
            name=tool.name,
            description=tool.description,
            parameters=json.dumps(_shown(tool), ensure_ascii=False),
            required=", ".join(tool.parameters.get("required", ())) or "none",
        )
        for i, tool in enumerate(tools, 1)
    ]
    return _PAPER.format(tools="\n".join(blocks))


def _shown(tool: Tool) -> object:
    """A tool's parameters by name; where its schema says more than them, all that it says."""
    rest = {key: value for key, value in tool.parameters.items() if key not in ("type", "required")}
    return rest.get("properties", {}) if rest.keys() <= {"properties"} else rest


def _prompt(
    tools: tuple[Tool, ...], messages: tuple[Message, ...], layout: Layout, instructions: str
) -> Prompt:
    handed = tuple(map(tool_line, tools)) if layout == "template" else ()
    return Prompt(system(tools, layout, instructions), messages, handed)


def _asked(query: Query, layout: Layout) -> tuple[Message, ...]:
    """The conversation as a layout shows it: under `paper` several turns are a transcript in one."""
    closing = _PAPER_CLOSING.get(query.benchmark) if layout == "paper" else None
    if layout != "paper" or (len(query.messages) == 1 and not closing):
        return query.messages
    return (Message("user", "\n\n".join(filter(None, [transcript(query), closing]))),)


def act(query: Query, layout: Layout = "native", instructions: str = "") -> Prompt:
    """The prompt that asks for the answer."""
    return _prompt(query.tools, _asked(query, layout), layout, instructions)


def transcript(query: Query) -> str:
    """The seed as plain text: the question itself, or the whole conversation with its speakers."""
    if len(query.messages) == 1:
        return query.messages[0].content
    return "\n".join(f"{m.role}: {m.content}" for m in query.messages if m.content)


def synthesis(query: Query, layout: Layout = "native", instructions: str = "") -> Prompt:
    """The prompt that asks for a similar request with its answer. Paper: section 3.2, figure 6."""
    asked = _SYNTHESIS.format(question=transcript(query))
    return _prompt(query.tools, (Message("user", asked),), layout, instructions)


def example(
    tools: tuple[Tool, ...], question: str, layout: Layout = "native", instructions: str = ""
) -> Prompt:
    """The prompt of a training example: the form of `act`, with the synthetic question."""
    return _prompt(tools, (Message("user", question),), layout, instructions)


def with_shot(
    query: Query,
    question: str,
    answer: str,
    tools: tuple[Tool, ...] = (),
    layout: Layout = "native",
    instructions: str = "",
) -> Prompt:
    """The act prompt with one worked example before the last user turn's request.

    `tools`: the example's own tools where they differ from the query's.
    """
    note = " that used other functions:\n" + "\n".join(map(tool_line, tools)) if tools else ""
    asked = _asked(query, layout)
    last = max(i for i, m in enumerate(asked) if m.role == "user")
    words = _SHOT.format(note=note, question=question, answer=answer, request=asked[last].content)
    messages = (*asked[:last], Message("user", words), *asked[last + 1 :])
    return _prompt(query.tools, messages, layout, instructions)


def version(layout: Layout = "native") -> str:
    """A hash of every text that a layout uses: results of other words are other results."""
    words = {
        "native": [OPENING, _SYSTEM],
        "paper": ["paper", OPENING, _PAPER, _PAPER_TOOL, json.dumps(_PAPER_CLOSING)],
        "template": ["template", _TEMPLATE_OPENING],
    }
    text = "\x1f".join([*words[layout], _SYNTHESIS, _SHOT])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
