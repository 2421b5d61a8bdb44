"""Which calls of `loge.apply` a page of the documentation shows, and which are predicted to be slow on a GPU."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator

from .paper.run import step_seconds
from .policies import Policy, argument, parse

_CALL = re.compile(r"\bloge\.apply\(")
_READ = ("rank", "exact_layers", "exact_every", "exact_dtype", "base_dtype")


def slow_calls(page: str, gpu: str = "H100", model: str = "LLaMA-3-8B") -> list[str]:
    """The low-rank calls on `page`, the text of a Markdown file, whose step is predicted to take no less time than that
    of plain `loge.apply(model)`: one line for each. An exact call is never among them."""
    plain = step_seconds(parse("apply").on_paper(), gpu, model)
    seconds = {text: step_seconds(policy.on_paper(), gpu, model) for text, policy in calls(page) if policy.low_rank}
    return [
        f"{text}: {1e3 * own:.0f} ms a step on {gpu}, plain {1e3 * plain:.0f} ms"
        for text, own in seconds.items()
        if own >= plain
    ]


def calls(page: str) -> Iterator[tuple[str, Policy]]:
    """Every call of `loge.apply` in code blocks and in sentences, with what of its arguments a step on paper knows.
    Arguments that are no plain values, and calls that are no Python, are left out."""
    for found in _CALL.finditer(page):
        ends = (end.end() for end in re.compile(r"\)").finditer(page, found.end()))
        for end in ends:
            text = page[found.start() : end]
            with contextlib.suppress(SyntaxError):
                call = ast.parse(text.replace("…", "..."), mode="eval").body
                if isinstance(call, ast.Call):
                    yield " ".join(text.split()), _policy(call)
                    break


def _policy(call: ast.Call) -> Policy:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if len(call.args) > 1:
        given["rank"] = call.args[1]
    plain = {name: ast.unparse(value).replace(" ", "").strip("'\"") for name, value in given.items() if name in _READ}
    # A pair is typed with two dots between its shares.
    values = {name: argument(text.strip("()").replace(",", "..")) for name, text in plain.items()}
    known = {name: value for name, value in values.items() if not isinstance(value, str) or name.endswith("_dtype")}
    return Policy("loge.apply", {name: value for name, value in known.items() if name is not None})
