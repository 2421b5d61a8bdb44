"""LoRA in a loop of one's own: PEFT as always, and one more line.

python examples/peft_loop.py [a model's directory or hub id]
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import loge_kernels as loge

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# Your text instead of a module of Python's own. Rows of 128 tokens, four to a batch; the last batch is held out.
text = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]
tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0]
batches = [rows.to(device) for rows in tokens[: len(tokens) // 512 * 512].view(-1, 4, 128)]
*batches, held_out = batches

model = AutoModelForCausalLM.from_pretrained(name).to(device)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
report = loge.apply(model)  # the one more line
print(report.summary())


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, labels=rows).loss


@torch.no_grad()
def held_out_loss() -> float:
    model.eval()
    return loss_of(held_out).item()


before = held_out_loss()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
model.train()
for rows in batches:
    loss_of(rows).backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"held-out loss: {before:.4f} before, {held_out_loss():.4f} after {len(batches)} steps")

model.save_pretrained("adapter")  # PEFT's files; they load without loge_kernels
