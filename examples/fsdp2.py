"""FSDP2 with an exact backward in 8 bits, which gathers half the bytes of 16-bit weights.

torchrun --nproc-per-node 2 examples/fsdp2.py [a model's directory or hub id]
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

import loge_kernels as loge

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)  # adapters start alike on every rank

# Your text instead of a module of Python's own. Rows of 128 tokens, two to a rank; the last batch is held out.
text = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]
tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0].to(device)
rows = tokens[: len(tokens) // (256 * world) * 256 * world].view(-1, world, 2, 128)[:, rank]
*batches, held_out = [{"input_ids": mine, "labels": mine} for mine in rows]

model = AutoModelForCausalLM.from_pretrained(name).to(device)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
float8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
report = loge.apply(model, exact_dtype="float8" if float8 else "int8")
loge.fully_shard(model)  # instead of torch's on every layer and on the model


@torch.no_grad()
def held_out_loss() -> float:
    model.eval()
    loss = model(**held_out).loss
    distributed.all_reduce(loss)
    return loss.item() / world


before = held_out_loss()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
model.train()
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after = held_out_loss()
if rank == 0:
    print(report.summary(), f"held-out loss: {before:.4f} before, {after:.4f} after {len(batches)} steps", sep="\n")
distributed.destroy_process_group()
