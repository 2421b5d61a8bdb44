"""LoRA with transformers' Trainer: `apply` before the Trainer is made, and nothing else changes.

python examples/trainer.py [a model's directory or hub id]
"""

import argparse
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import loge_kernels as loge

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"

# Your text instead of a module of Python's own, in rows of 128 tokens; the last four are held out.
text = Path(argparse.__file__).read_text(encoding="utf-8")[:20_000]
tokens = AutoTokenizer.from_pretrained(name)(text).input_ids
rows = [tokens[start : start + 128] for start in range(0, len(tokens) - 127, 128)]
data = [{"input_ids": row, "labels": row} for row in rows]

model = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
report = loge.apply(model)
print(report.summary())

arguments = TrainingArguments(
    "out",
    num_train_epochs=1,
    per_device_train_batch_size=4,
    learning_rate=5e-4,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
    seed=0,
)
trainer = Trainer(model, arguments, train_dataset=data[:-4], eval_dataset=data[-4:])
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"held-out loss: {before:.4f} before, {after:.4f} after {trainer.state.global_step} steps")

model.save_pretrained("adapter")  # PEFT's files; they load without loge_kernels
