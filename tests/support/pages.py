"""The pages of the documentation as tests see them: their blocks of code, and what these are run with."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"# needs: (\S+)\n")
_WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def missing(self) -> str | None:
        """What it needs and this machine lacks: a package, or what no test has ("a GPU")."""
        needs = _NEEDS.match(self.text)
        return None if needs is None or find_spec(needs[1]) is not None else needs[1]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in order."""
    text = page.read_text()
    found = ((m[1].strip(), m[2], text[: m.start()].count("\n") + 2) for m in _FENCE.finditer(text))
    return [Block(page, line, language, code) for language, code, line in found if language in languages]


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block in a namespace, one statement after the other, so that a traceback has the page's line.

    Lines that do something to the same model are alternatives to each other: what was applied before is removed, and a
    model that was adapted before is a fresh one.
    """
    tree = ast.parse(block.text)
    ast.increment_lineno(tree, block.line - 1)
    for statement in tree.body:
        for model in _argument_of(statement, "loge.apply", "loge.calibrate"):
            names["loge"].remove(names[model])
        for model in _argument_of(statement, "get_peft_model"):
            if model not in names or _is_adapted(names[model]):
                names[model] = names["fresh_model"]()
        exec(compile(ast.Module([statement], []), str(block.page), "exec"), names)


def _argument_of(statement: ast.stmt, *functions: str) -> Iterator[str]:
    """The name of the first argument, where the statement is a call of one of these or assigns one's result."""
    call = getattr(statement, "value", None)
    if isinstance(call, ast.Call) and ast.unparse(call.func) in functions:
        yield ast.unparse(call.args[0])


def _is_adapted(model: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(200, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def as_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that torchrun gives to one process alone."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def namespace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take as given (`model`, `batches`, `data`, …), tiny, and hub ids that give the same tiny model."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
    )

    import loge_kernels as loge

    saved = tiny_llama.save(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **_WIDE)).save_pretrained(saved)
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        return load(saved, **options).train()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.chdir(folder)

    class Interrupted(Trainer):
        """One that finds the checkpoint which it resumes from."""

        def train(self, resume_from_checkpoint: bool = False) -> Any:
            super().train()
            shutil.rmtree(Path(self.args.output_dir, "checkpoint-4"))
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    rows, linear = Rows(), nn.Linear(512, 384)
    return {
        "__name__": "page",
        "loge": loge,
        "torch": torch,
        "fresh_model": lambda: from_pretrained("a model"),
        "model": from_pretrained("a model"),
        "tokenizer": tokenizer,
        "batches": list(torch.utils.data.DataLoader(rows, 4)),
        "data": rows,
        "Trainer": Interrupted,
        "args": TrainingArguments("out", max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True),
        "linear": linear,
        "x": torch.randn(4, 512, requires_grad=True),
        "weight": linear.weight.detach(),
        "bias": linear.bias.detach(),
        "lora_A": torch.randn(8, 512, requires_grad=True),
        "lora_B": torch.randn(384, 8, requires_grad=True),
    }
