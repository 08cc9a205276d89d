"""One question through Algorithm 1, with everything that happens on the way.

    python examples/agent.py "How do I get from Rome to Oslo?"
    python examples/agent.py --tau 0.5 --model path/to/a/model --tools my_tools.json "…"

The model's text is printed as a Python literal, so that nothing in it reaches the terminal as a command.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from study.data.models import model_dir
from ttsi import Agent

TOOLS = [
    {
        "name": "find_train",
        "description": "Trains between cities.",
        "parameters": {"origin": {"type": "str"}, "destination": {"type": "str"}},
        "required": ["origin", "destination"],
    },
    {
        "name": "find_flight",
        "description": "Flights between cities.",
        "parameters": {"origin": {"type": "str"}, "destination": {"type": "str"}},
        "required": ["origin", "destination"],
    },
    {
        "name": "find_hotel",
        "description": "Hotels in a city.",
        "parameters": {"city": {"type": "str"}, "nights": {"type": "int"}},
        "required": ["city", "nights"],
    },
]


def main() -> None:
    """Asks one question and prints the stages and the answer."""
    project = Path(__file__).resolve().parent.parent
    os.environ.setdefault("TTSI_CACHE", str(project / ".cache"))  # where make keeps models, too
    parser = argparse.ArgumentParser(description="Asks an agent that adapts itself to what it is unsure of.")
    parser.add_argument("question", nargs="?", default="How do I get from Rome to Oslo?")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="a name, a folder, or org/name@commit")
    parser.add_argument("--tools", type=Path, help="JSON file: a list of functions")
    parser.add_argument("--h", choices=["likelihood", "margin"], default="likelihood", help="what H reads")
    parser.add_argument("--tau", type=float, help="adapt where H is below (default: 0.5, of margin 0.95)")
    asked = parser.parse_args()

    tools = json.loads(asked.tools.read_text()) if asked.tools else TOOLS
    agent = Agent(model_dir(asked.model), tools, uncertainty=asked.h, tau=asked.tau, required=True)
    answer = agent.call(asked.question)

    certainty = answer.likelihood if asked.h == "likelihood" else answer.margin
    verdict = "uncertain" if answer.uncertain else "certain"
    print(f"H  {asked.h} {certainty:.3f}: {verdict} at {answer.tau}")
    for name, log_prob in answer.log_probs.items():
        print(f"     {log_prob:8.2f} nats  {name!r}")
    for example in answer.examples:
        print(f"G  {example.question!r}\n     {[(c.name, dict(c.arguments)) for c in example.calls]}")
    if answer.failures:
        print(f"G  {len(answer.failures)} tries could not be read: {', '.join(answer.failures)}")
    if answer.losses:
        print(f"T  loss {' → '.join(f'{loss:.3f}' for loss in answer.losses)} nats per token")
    if answer.likelihood_adapted is not None:
        print(f"   likelihood {answer.likelihood:.3f} before, {answer.likelihood_adapted:.3f} after")
    print(f"   {'the adapted model' if answer.adapted else 'the model as it is'} answers ({answer.why!r}):")
    for call in answer.calls:
        print(f"     {call.name!r} {dict(call.arguments)}")
    if not answer.calls:
        print(f"     {answer.text!r}")
    for problem in answer.problems:
        print(f"     not as declared: {problem!r}")
    print("   seconds: " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in answer.seconds.items()))


if __name__ == "__main__":
    main()
