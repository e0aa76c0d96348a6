"""Log-probabilities by OpenVINO GenAI: run_openvino_genai.py BASE PROMPTS.json ANSWERS.json [ADAPTER ...]

It tells the log-probability of the token that comes, no others; so every beginning is tried with every token.
"""

import json
import sys
import tempfile
from pathlib import Path

import openvino_genai as genai
from openvino import Tensor
from optimum.intel import OVModelForCausalLM


def pipeline(base, adapters):
    with tempfile.TemporaryDirectory() as folder:
        OVModelForCausalLM.from_pretrained(base, export=True, compile=False, load_in_8bit=False).save_pretrained(folder)
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 4096
        options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if adapters:
            options["adapters"] = genai.AdapterConfig(adapters)
        return genai.ContinuousBatchingPipeline(folder, genai.Tokenizer(folder), scheduler, "CPU", **options)


def main(base, prompts, answers, *adapters):
    prompts = json.loads(Path(prompts).read_text())
    vocabulary = json.loads((Path(base) / "config.json").read_text())["vocab_size"]
    loaded = {folder: genai.Adapter(f"{folder}/adapter_model.safetensors") for folder in adapters}
    pipe = pipeline(base, list(loaded.values()))

    def distribution(beginning, config):
        handles = [pipe.add_request(i, Tensor([[*beginning, i]]), config) for i in range(vocabulary)]
        while pipe.has_non_finished_requests():
            pipe.step()
        return [handle.read_all()[0].generated_log_probs[len(beginning)] for handle in handles]

    found = {}
    for folder in ["", *adapters]:
        # The weight is what stands for alpha / r: neither is read from an adapter.
        config = genai.GenerationConfig(max_new_tokens=1, logprobs=1, echo=True)
        config.adapters = genai.AdapterConfig([(loaded[folder], 1.0)] if folder else [])
        # Of the two calls only this one switches adapters, and only the other one tells more than a score.
        pipe.generate([Tensor([prompts[0]])], [config])
        found[folder] = [[distribution(p[: i + 1], config) for i in range(len(p))] for p in prompts]
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
