"""Log-probabilities by vLLM: run_vllm.py BASE PROMPTS.json ANSWERS.json [ADAPTER ...]"""

import json
import os
import sys
from pathlib import Path

# Read when vLLM is imported: one process, which an error leaves with its message; 1 GiB of cache; no pinning.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def main(base, prompts, answers, *adapters):
    prompts = json.loads(Path(prompts).read_text())
    # vLLM's CPU backend can't give prompt_logprobs with LoRA, so every beginning is a prompt of its own.
    beginnings = [TokensPrompt(prompt_token_ids=p[: i + 1]) for p in prompts for i in range(len(p))]
    llm = LLM(
        base,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_logprobs=-1,
        enable_lora=True,
        max_lora_rank=16,
    )
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)

    def answer(adapter, number):
        request = LoRARequest(adapter, number, adapter) if adapter else None
        try:
            outputs = llm.generate(beginnings, params, lora_request=request)
        except ValueError as error:
            return {"error": str(error)}
        found = ([d[token].logprob for token in range(len(d))] for o in outputs for d in o.outputs[0].logprobs)
        return [[next(found) for _ in p] for p in prompts]

    found = {adapter: answer(adapter, number) for number, adapter in enumerate(["", *adapters])}
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
