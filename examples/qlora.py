"""QLoRA: a base that bitsandbytes keeps in 4 bits, LoRA around it, and `apply` over both.

pip install "loge_kernels[peft,quant]"
python examples/qlora.py [a model's directory or hub id]
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import loge_kernels as loge

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
torch.manual_seed(0)

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, device_map="auto")
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
report = loge.apply(model)  # exact; with rank= the backward never dequantises, for a biased gradient
print(report.summary())

# Your text instead of a module of Python's own. Rows of 128 tokens, four to a batch; the last batch is held out.
text = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]
tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0]
batches = [rows.to(model.device) for rows in tokens[: len(tokens) // 512 * 512].view(-1, 4, 128)]
*batches, held_out = batches


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16):  # base and adapter in one op
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
