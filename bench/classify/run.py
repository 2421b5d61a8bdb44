"""Accuracy of exact LoRA and of each policy of `loge.apply` on a classification task, an encoder's or a decoder's.

Every policy of a seed starts from the same head and adapters, sees the same batches and trains in turn, a step of each,
so that a slow spell of the machine falls on all. Seeds differ in these and in the choice of snippets. The held-out
snippets are of other files. LoRA is on every linear layer of the blocks; what stands above them trains whole.

A file given as `json` is kept up to date after every seed, and what it holds is not run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..measure import output
from ..measure.environment import describe
from ..measure.resuming import begin
from . import report, text
from .options import ClassifyOptions
from .training import train

VERSION = 2  # of the file; 1 had one seed, and no policies by name
_DEFAULT = "all-MiniLM-L6-v2"


def run(options: ClassifyOptions, console: Console | None = None, progress: Console | None = None) -> dict[str, Any]:
    """Run what `options.json` does not hold yet, print the table, write the file, and return what it holds.

    Raises ValueError for an argument that cannot work, a model that is not installed or cannot be read, a policy that
    `loge.apply` refuses, and a file with other settings. What was measured before stays in the file.
    """
    policies = options.check()
    result = begin("classify", VERSION, options.json, options.settings())
    progress = progress or Console(stderr=True)
    packages = text.read(options.classes)
    if result.setdefault("text_sha256", packages.fingerprint()) != packages.fingerprint():
        raise ValueError(f"--json {options.json}: the text has changed since its runs; choose another file")
    result["packages"] = list(packages.names)
    result["model"] = _DEFAULT if options.model is None else Path(options.model).name
    done = {(row["policy"], row["seed"]) for row in result["rows"]}
    for seed in dict.fromkeys(options.seeds):
        pending = [policy for policy in policies if (policy.text, seed) not in done]
        if pending:
            with torch.random.fork_rng([]):
                result["rows"] += train(options, pending, seed, packages, progress)
            result["environment"] = describe(torch.device("cpu"))
            report.conclude(result, 1 / options.labels)
            output.write(result, options.json)
            for row in result["rows"][-len(pending) :]:
                what = f"{row['policy']}, seed {seed}: accuracy {row['accuracy']:.1%}"
                progress.print(what, highlight=False, markup=False)
    report.print_table(console or Console(), result)
    return result
