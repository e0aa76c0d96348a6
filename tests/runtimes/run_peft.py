"""Logits by PEFT and transformers: run_peft.py BASE PROMPTS.json ANSWERS.json [ADAPTER ...]"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logits(base, prompts, adapter, **options):
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, **options)
    return model.eval()(torch.tensor(prompts)).logits


def main(base, prompts, answers, *adapters):
    prompts = json.loads(Path(prompts).read_text())

    def answer(adapter):
        try:
            value = logits(base, prompts, adapter)
            # Modules that are targeted but have no weights are filled with NaN that way.
            if adapter and not torch.equal(value, logits(base, prompts, adapter, low_cpu_mem_usage=True)):
                return {"error": "low_cpu_mem_usage changes the logits"}
        except (RuntimeError, TypeError, ValueError) as error:
            return {"error": str(error)}
        return value.tolist()

    Path(answers).write_text(json.dumps({adapter: answer(adapter) for adapter in ["", *adapters]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
