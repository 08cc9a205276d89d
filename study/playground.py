"""Algorithm 1 by hand: tools and a question to type, a slider for τ, and what H, G and T make of them.

Needs ipywidgets and a notebook. What a model wrote and what was typed is escaped before it is shown.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures import COLOURS, style
from study.data import benchmarks, fixture, sources
from study.run.config import Profile
from ttsi import estimator
from ttsi.agent import Agent, Answer, Live
from ttsi.engines.base import EngineError
from ttsi.types import Call, Generation, TrainingMode

if TYPE_CHECKING:
    from ttsi.engines.torch import TorchEngine

QUESTION = "How do I get from Rome to Oslo?"
"""A question that two of the tools below answer: nothing can be sure of it."""
_TOOLS = ("find_train", "find_flight", "find_hotel", "find_restaurant")
_NO_MODEL = "This run shows stored results and loads no model: run the notebook without `source`."
_NO_QUESTION = "Type a question first: Enter asks it."
_CHANGED = "The question or the tools have changed since: Enter asks anew."
_FADED = "ttsi-faded"
_WIDE = widgets.Layout(width="auto")
_CODE = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;font-size:12px"


def default_tools() -> str:
    """Four tools written for this project, as JSON text."""
    record = {"query": QUESTION, "tools": [fixture.tool(n) for n in _TOOLS], "answers": []}
    tools = benchmarks.to_sample(record, "live", 0, tool_order="original").tools
    rows = ({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools)
    return "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"


def settings(profile: Profile, mode: TrainingMode) -> dict[str, Any]:
    """An agent's settings as a profile has them, so that the panel does what the study does."""
    return {
        "lora": profile.lora(mode),
        "k": profile.k,
        "retries": profile.retries,
        "answering": profile.direct_sampling,
        "writing": profile.synthesis_sampling,
        "required": profile.answer_opening,
        "layout": profile.layout,
        "instructions": profile.instructions,
        "seed": profile.seeds[0],
    }


class Playground:
    """Widgets around an `Agent`: show `view`, then type, press Enter or *Ask*, and move τ.

    engine: the model, or what loads it when first asked; None: nothing is computed, and the panel says so.
    settings: more of `Agent`'s, e.g. `lora`. Moving τ computes what the new threshold asks for and hasn't
    been computed yet. Results fade while another question than theirs is typed.
    """

    def __init__(
        self,
        engine: TorchEngine | Callable[[], TorchEngine] | None,
        *,
        question: str = QUESTION,
        tools: str | None = None,
        tau: float = 0.95,
        mode: TrainingMode = "activated",
        **settings: Any,
    ) -> None:
        self.engine, self.mode, self.settings = engine, mode, settings
        self.live: Live | None = None
        self.answer: Answer | None = None
        self.asked: tuple[str, str] | None = None  # the tools and the question that the results are of
        self.faded = False
        self._stays: Any = None  # where `keep` showed the picture
        self.tools = widgets.Textarea(value=tools or default_tools(), rows=7, layout=_WIDE)
        self.question = widgets.Text(value=question, layout=_WIDE)
        self.tau = widgets.FloatSlider(
            value=tau, min=0, max=1, step=0.01, description="τ", continuous_update=False, layout=_WIDE
        )
        self.button = widgets.Button(description="Ask", button_style="primary")
        self.status = widgets.HTML()
        self.panes = {name: widgets.HTML(layout=_WIDE) for name in ("h", "g", "t", "answer")}
        self.results = widgets.VBox([*self.panes.values()])
        self.button.on_click(lambda _: self.ask())
        self.question.on_msg(self._enter)
        for typed in (self.question, self.tools):
            typed.observe(lambda _: self._fade(), names="value")
        self.tau.observe(lambda _: self._walk(), names="value")
        self.view = widgets.VBox(
            [
                widgets.HTML(f"<style>.{_FADED} {{opacity: .35}}</style>"),
                widgets.HTML("<b>Tools</b> (JSON Schema, or OpenAI's function format)"),
                self.tools,
                widgets.HTML("<b>Question</b>"),
                self.question,
                widgets.HBox([self.button, self.status]),
                self.tau,
                self.results,
            ],
            layout=widgets.Layout(max_width="900px"),
        )

    def ask(self) -> None:
        """Takes the tools and the question as they are typed now and runs Algorithm 1 on them."""
        self.live = self.answer = self.asked = None
        for pane in self.panes.values():
            pane.value = ""
        self._fade()
        try:
            self.live = self._open()
        except (ValueError, sources.Unavailable, sources.WrongBytes) as error:
            self._say(str(error))
            self._draw()
            return
        self.asked = self.tools.value, self.question.value
        self._walk()

    def _enter(self, _: Any, message: dict[str, Any], __: Any) -> None:
        if message.get("event") == "submit":
            self.ask()

    def _open(self) -> Live:
        """The question that is typed, opened; the model is loaded if it isn't. Raises what `ask` shows."""
        if self.engine is None:
            raise ValueError(_NO_MODEL)
        if not self.question.value.strip():
            raise ValueError(_NO_QUESTION)
        tools = _read(self.tools.value)
        if callable(self.engine):
            self._say("loading the model …")
            self.engine = self.engine()
        paper: dict[str, Any] = {"uncertainty": "margin", "answer_with": "adapted", "filters": ()}
        agent = Agent(self.engine, tools, mode=self.mode, **paper | self.settings)
        return agent.open(self.question.value)

    def _fade(self) -> None:
        """Results of another question than the one that is typed now stand back until it is asked."""
        before, self.faded = self.faded, self.asked not in (None, (self.tools.value, self.question.value))
        if self.faded:
            self.results.add_class(_FADED)
            self._say(_CHANGED)
        elif before:
            self.results.remove_class(_FADED)
            self._say(_done(self.answer))

    def _walk(self) -> None:
        """Shows each stage as soon as it has run, then the answers before and after."""
        if (live := self.live) is None:
            return
        tau = self.tau.value
        self.button.disabled = True
        try:
            self._say("H: scoring the tools …")
            self.panes["h"].value = _h(live, tau)
            uncertain = live.certainty.margin < tau
            self.panes["g"].value = self.panes["t"].value = ""
            self._say("the model as it is answers …")
            self.panes["answer"].value = _answers(live, None)
            if uncertain:
                self._say("G: writing a similar question …")
                self.panes["g"].value = _g(live)
                self._say("T: training an adapter …")
                self.panes["t"].value = _t(live)
                self._say("the adapted model answers …")
            self.answer = live.answer(tau)
            self.panes["answer"].value = _answers(live, self.answer)
            self._say(_done(self.answer))
        except EngineError as error:
            self.answer = None
            self._say(f"the machine failed: {error}")
        finally:
            self.button.disabled = False
            self._fade()
            self._draw()

    def _say(self, text: str) -> None:
        self.status.value = _text(text)

    def keep(self) -> None:
        """Shows the picture below a notebook's cell, where it follows every answer and stays."""
        image = Image(self.picture())  # type: ignore[no-untyped-call]
        self._stays = display(image, display_id=True)  # type: ignore[no-untyped-call]

    def _draw(self) -> None:
        if self._stays is not None:
            self._stays.update(Image(self.picture()))  # type: ignore[no-untyped-call]

    def picture(self) -> bytes:
        """What H and T came to, as a PNG: what stays when the kernel behind the widgets is gone."""
        with style():
            figure = Figure(figsize=(7.2, 2.2), layout="constrained")
            if self.answer is None:
                figure.text(0.02, 0.5, _NO_MODEL if self.engine is None else "Nothing was answered.")
            else:
                asked = self.asked[1] if self.asked else ""
                figure.suptitle(_visible(asked)[:120], fontsize=8, parse_math=False)
                left, right = figure.subplots(1, 2)
                _draw_scores(left, self.answer)
                _draw_losses(right, self.answer)
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=144)
        return data.getvalue()


_BAR = COLOURS["tt_si"]


def _draw_scores(axes: Axes, answer: Answer) -> None:
    names, shares = [_visible(n) for n in answer.log_probs], estimator.rss(list(answer.log_probs.values()))
    axes.barh(range(len(names)), shares, color=_BAR)
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a name is no formula
    axes.invert_yaxis()
    verdict = f"H: margin {answer.margin:.2f} {'<' if answer.uncertain else '≥'} τ = {answer.tau:.2f}"
    axes.set(xlim=(0, 1), xlabel="relative softmax score", title=verdict)


def _draw_losses(axes: Axes, answer: Answer) -> None:
    steps = range(1, len(answer.losses) + 1)
    axes.plot(steps, answer.losses, "o-", color=_BAR)
    axes.set_xticks(steps)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 1.1 * max(answer.losses, default=1)))
    axes.set(title="T: the example's loss" if answer.losses else "T: nothing was trained")


def _done(answer: Answer | None) -> str:
    return f"done: {'adapted' if answer.adapted else 'answered as it is'}" if answer else ""


def _read(text: str) -> list[Any]:
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tools are no JSON: {error}") from error
    if not isinstance(tools, list):
        raise ValueError("the tools are no list: write [ … ] around them")
    return tools


def _visible(text: str) -> str:
    """Text whose control characters are shown and not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _text(text: str) -> str:
    """Untrusted text, safe inside HTML."""
    return html.escape(_visible(text))


def _pane(title: str, body: str) -> str:
    return (
        f"<div style='border-top:1px solid #ccc;padding-top:4px;line-height:1.5'><b>{title}</b>{body}</div>"
    )


def _code(text: str) -> str:
    return f"<div style='{_CODE}'>{_text(text)}</div>"


def _bar(label: str, share: float, value: str) -> str:
    return (
        "<div style='display:flex;align-items:center;gap:8px'>"
        f"<div style='width:180px;overflow-wrap:anywhere'>{_text(label)}</div>"
        f"<div style='flex:1;background:#eee'><div style='width:{100 * share:.1f}%;height:12px;"
        f"background:{_BAR}'></div></div><div style='width:70px'>{value}</div></div>"
    )


def _h(live: Live, tau: float) -> str:
    u = live.certainty
    shares = estimator.rss(u.log_probs)
    bars = (_bar(t.name, p, f"{p:.3f}") for t, p in zip(live.query.tools, shares, strict=True))
    verdict = "&lt; τ: uncertain, adapt" if u.margin < tau else "≥ τ: certain, answer as it is"
    title = f"H · margin u = p(1) − p(2) = {u.margin:.3f} {verdict}"
    return _pane(title + _took(live, "h"), "".join(bars))


def _g(live: Live) -> str:
    s = live.synthesis
    parts = []
    for e in s.examples:
        quality = f"similarity to the question {e.copy_ratio:.2f}; "
        quality += _text("; ".join(e.schema_errors)) or "its arguments fit the schema"
        parts.append(_code(f"{e.question}\n{_calls(e.calls)}") + f"<div>{quality}</div>")
    if s.failures:
        parts.append(f"<div>could not be read: {_text(', '.join(s.failures))}</div>")
    if s.failed:
        parts.append("<div>no example: the model answers as it is</div>")
    return _pane("G · the example it wrote" + _took(live, "g"), "".join(parts))


def _t(live: Live) -> str:
    if live.trained is None:
        return "" if live.synthesis.failed else _pane("T · training diverged", "")
    losses = live.trained[1].losses
    top = max(losses) or 1.0
    bars = "".join(_bar(f"step {i}", x / top, f"{x:.3f}") for i, x in enumerate(losses, 1))
    return _pane("T · loss, nats per token" + _took(live, "t"), bars)


def _answers(live: Live, answer: Answer | None) -> str:
    rows = "<div>before" + _took(live, "base") + "</div>" + _reply(live.before)
    if answer and answer.adapted and live.after:
        same = " (the same)" if live.after.text == live.before.text else ""
        rows += f"<div>after{same}" + _took(live, "answer") + "</div>" + _reply(live.after)
    for problem in answer.problems if answer else ():
        rows += f"<div>{_text(problem)}</div>"
    return _pane("Answer", rows)


def _reply(reply: Generation) -> str:
    return _code(reply.text + ("" if reply.finished else " … (cut)"))


def _calls(calls: Sequence[Call]) -> str:
    return "\n".join(f"{c.name} {json.dumps(dict(c.arguments), ensure_ascii=False)}" for c in calls)


def _took(live: Live, stage: Any) -> str:
    seconds = live.seconds.get(stage)
    return "" if seconds is None else f" <span style='color:#666'>· {seconds:.2f} s</span>"
