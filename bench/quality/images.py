"""Pictures of handwritten digits that scikit-learn ships, and two small networks that classify them."""

import csv
import gzip
import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfac.cli.corpus import Corpus
from hfac.cli.errors import UsageError
from hfac.cli.model import Block, initialize

SIDE, CLASSES = 8, 10
PATCH = 2
BRIGHTEST = 16
#: one picture in so many is held out
HELD_OUT = 5


def load_digits() -> Corpus:
    """The 1,797 pictures of 8 x 8 pixels: rows of 64 pixels (0 to 16) and the digit, uint8; every fifth is held out.

    The file is read without importing scikit-learn, which would take each run's process seconds.
    """
    found = importlib.util.find_spec("sklearn")
    folders = (found.submodule_search_locations if found else None) or []
    files = (Path(folder, "datasets/data/digits.csv.gz") for folder in folders)
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise UsageError(
            "the tasks vit and cnn require the digits that scikit-learn ships, which was not found; run: "
            "python -m pip install --no-deps scikit-learn (its own requirements are not needed), or give --tasks gpt"
        )
    content = gzip.decompress(file.read_bytes())
    rows = [[int(float(cell)) for cell in row] for row in csv.reader(content.decode("ascii").splitlines())]
    data = torch.tensor(rows, dtype=torch.uint8)
    held_out = torch.arange(len(data)) % HELD_OUT == 0
    return Corpus(data[~held_out], data[held_out], "scikit-learn's digits", 1, hashlib.sha256(content).hexdigest())


def shifted_batch(data: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pictures, each moved by up to one pixel along both axes, without which 1,438 of them are soon known by
    heart; inputs float32 [batch_size, 1, 8, 8] and targets int64. `generator` lives on the CPU."""
    chosen = torch.randint(len(data), (batch_size,), generator=generator)
    offsets = torch.randint(3, (2, batch_size, 1), generator=generator)
    pictures, digits = unpacked(data[chosen.to(data.device)])
    rows, columns = (offsets + torch.arange(SIDE)).to(data.device)
    padded = F.pad(pictures[:, 0], (1, 1, 1, 1), value=-1.0)  # the background's brightness
    picture = torch.arange(batch_size, device=data.device)[:, None, None]
    return padded[picture, rows[:, :, None], columns[:, None, :]][:, None], digits


def unpacked(data: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures float32 [n, 1, 8, 8] from -1 to 1, and digits int64 [n]."""
    pictures = data[:, :-1].float() * (2 / BRIGHTEST) - 1
    return pictures.view(-1, 1, SIDE, SIDE), data[:, -1].long()


class Classifier(nn.Module):
    """What both networks share: the loss."""

    def loss(self, pictures: Tensor, digits: Tensor) -> Tensor:
        """Mean cross-entropy in nats per picture; a float32 scalar."""
        return F.cross_entropy(self(pictures).float(), digits)


class ViT(Classifier):
    """Vision transformer over patches of 2 x 2 pixels, with learned positions and the mean of all tokens classified."""

    def __init__(self, d_model: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH * PATCH, d_model)
        self.position_embedding = nn.Embedding((SIDE // PATCH) ** 2, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads, causal=False) for _ in range(layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, CLASSES)
        initialize(self, d_model, layers)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map pictures [n, 1, 8, 8] to logits [n, 10]."""
        patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)  # [n, 16, 4]
        x = self.patch_embedding(patches) + self.position_embedding.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x).mean(1))


class CNN(Classifier):
    """Four 3 x 3 convolutions, two of them with stride 2, each with group norm; then the mean over places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (1, width, 2 * width, 2 * width, 4 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            for before, after, stride in zip(widths, widths[1:], (1, 2, 1, 2), strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, after) for after in widths[1:])
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [n, 1, 8, 8] to logits [n, 10]."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))
