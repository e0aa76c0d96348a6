"""Logits by ONNX Runtime GenAI: run_onnxruntime_genai.py BASE PROMPTS.json ANSWERS.json [ADAPTER ...]

Its builder adds an adapter's factors to the graph, which makes a model of its own of each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime_genai as og


def build(base, adapter, out):
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command += ["-i", base, "-o", out, "-c", f"{out}/cache"]
    if adapter:
        command += ["--extra_options", f"adapter_path={adapter}"]
    return subprocess.run(command, capture_output=True, text=True)


def logits(model, prompt):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=64)
    generator = og.Generator(model, params)
    generator.append_tokens([prompt])
    return generator.get_output("logits")[0].tolist()


def main(base, prompts, answers, *adapters):
    prompts = json.loads(Path(prompts).read_text())
    found = {}
    for adapter in ["", *adapters]:
        with tempfile.TemporaryDirectory() as folder:
            built = build(base, adapter, folder)
            if built.returncode:
                found[adapter] = {"error": built.stderr[-2000:]}
                continue
            model = og.Model(folder)
            found[adapter] = [logits(model, prompt) for prompt in prompts]
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
