"""CIFAR-10: FIT against a ViT of equal FLOPs, the same training of both, in one run.

    python benchmarks/cifar10.py --data FOLDER --budget 2e14 --threads 2 --output FOLDER
    for part in 1/2 2/2; do python benchmarks/cifar10.py --part $part ... & done; wait      # beside each other first

FOLDER holds train/CLASS/ and test/CLASS/ with pictures. The ViT (patches, learned positions, pre-norm layers, mean over
tokens) is made of the library's own layers, as deep as FIT's FLOPs of an image allow. Both get the same budget of
FLOPs, forward and backward, and so read as many images. Pictures are shifted by up to 4 pixels and flipped; labels are
smoothed by 0.1; the rate rises and falls on lines; the residual branches of both begin at zero. A tenth of the training
part is held out: curves are measured on it, and by it each network's first seed chooses among `--lrs`. The test part is
read once, by what is trained to the end.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from budgeted_training import Budget, Result, Run, Settings, autocast
from race import Entry, Race, add_options, numbers, part_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITImageEncoder
from fitformer.data.build import read_parts
from fitformer.data.order import example_generator, hold_out, step_batch
from fitformer.data.settings import ImageData
from fitformer.diffusion import pixels_to_signal
from fitformer.models.config import TrunkConfig
from fitformer.models.encoder import Stem
from fitformer.models.initialization import zero_layer_branches, zero_trunk_branches
from fitformer.models.layers import TransformerLayer, layer_norm, linear
from fitformer.patching import PatchGrid
from fitformer.profiling.flops import count_parameters

SIDE, CHANNELS, CLASSES, MOST_SHIFT, SMOOTHING = 32, 3, 10, 4, 0.1
# The share of the training part that is held out, and by which seed.
HELD_OUT, SPLIT_SEED = 0.1, 0
# What a training step costs in forward passes.
STEP_IN_PASSES = 3
Images = tuple[Tensor, Tensor]


class ViT(nn.Module):
    """Patches with learned positions, transformer layers on all of them, the mean, a linear head."""

    def __init__(self, patch: int, layers: int, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.grid = PatchGrid(SIDE, SIDE, patch, CHANNELS)
        self.stem, self.position = (
            Stem(self.grid.token_dim, dim),
            nn.Parameter(torch.randn(self.grid.tokens_per_group, dim) * 0.02),
        )
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, drop_path=drop_path) for _ in range(layers))
        zero_layer_branches(self.layers)
        self.norm, self.head = layer_norm(dim), linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(b, classes)` of images `(b, H, W, 3)` in -1 .. 1."""
        x = self.stem(self.grid.group(images)[:, 0]) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def read(folder: Path) -> tuple[Images, Images, Images]:
    """Images uint8 `(k, 32, 32, 3)` and labels `(k,)` to train on, held out of them, and of the test part."""
    parts = read_parts(ImageData(source="folder", path=str(folder), image_size=SIDE))
    found = {}
    for name in ("train", "test"):
        source = parts[name]
        images = torch.stack([torch.tensor(source[k][0]) for k in range(len(source))])
        found[name] = images, torch.tensor(source.labels)
    images, labels = found["train"]
    kept, held = (torch.from_numpy(part) for part in hold_out(len(labels), HELD_OUT, SPLIT_SEED, labels.numpy()))
    return (images[kept], labels[kept]), (images[held], labels[held]), found["test"]


def batch_of(data: Images, settings: Settings, step: int) -> Images:
    """The images of a step, each shifted and perhaps flipped: a pure function of (seed, step)."""
    images, labels = data
    places = torch.tensor([index for _, index in step_batch(step, len(images), settings.batch, settings.seed)])
    random = example_generator(settings.seed, 0, step)
    padded = F.pad(images[places], (0, 0, MOST_SHIFT, MOST_SHIFT, MOST_SHIFT, MOST_SHIFT))
    top, left = torch.from_numpy(random.integers(2 * MOST_SHIFT + 1, size=(2, len(places), 1)))
    flipped = torch.from_numpy(random.random((len(places), 1)) < 0.5)
    across = torch.arange(SIDE)
    columns = left + torch.where(flipped, SIDE - 1 - across, across)
    each = torch.arange(len(places))[:, None, None]
    return padded[each, (top + across)[:, :, None], columns[:, None, :]], labels[places]


def image_flops(network: nn.Module) -> float:
    """Operations of a forward pass on one image, by torch's counter."""
    images = torch.zeros(1, SIDE, SIDE, CHANNELS)
    math = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        network(images)
    return float(counter.get_total_flops())


@dataclass
class ImageRun(Run):
    """The training of a classifier of images."""

    def __post_init__(self) -> None:
        self.flops_of_image = image_flops(self.network)
        super().__post_init__()

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Of images uint8, in float32."""
        device = self.settings.device
        with autocast(self.settings.mixed, 0, device):
            return network(pixels_to_signal(images.to(device))).float()

    def loss(self, batch: Images) -> Tensor:
        """Mean smoothed cross-entropy."""
        images, labels = batch
        logits = self.logits(self.network, images)
        return F.cross_entropy(logits, labels.to(logits.device), label_smoothing=SMOOTHING)

    def cost(self, batch: Images) -> float:
        """Operations of a step."""
        return STEP_IN_PASSES * self.flops_of_image * len(batch[1])

    @torch.no_grad()
    def error(self, data: Images, batch: int = 500) -> float:
        """The share of images that are misclassified, in percent."""
        network = self.measured().eval()
        wrong = sum(
            int((self.logits(network, images).argmax(-1).cpu() != labels).sum())
            for images, labels in zip(data[0].split(batch), data[1].split(batch), strict=True)
        )
        network.train()
        return 100 * wrong / len(data[1])


def vit_like(fit: nn.Module, patch: int, dim: int, heads: int, drop_path: float) -> Callable[[], ViT]:
    """The maker of the ViT whose FLOPs are nearest to a FIT's."""
    one, two = (image_flops(ViT(patch, layers, dim, heads, drop_path)) for layers in (1, 2))
    layers = max(1, round((image_flops(fit) - one) / (two - one)) + 1)
    return lambda: ViT(patch, layers, dim, heads, drop_path)


def measure(run: ImageRun, held: Images, test: Images) -> Result:
    """The error on the held-out images, which chooses, that on the test part, which counts, and what a pass costs."""
    return {
        "value": run.error(held),
        "test_error": run.error(test),
        "test_images": len(test[1]),
        "image_flops": run.flops_of_image,
    }


def accuracies(found: Sequence[Result]) -> str:
    """Mean accuracy in percent and, of several, the spread."""
    values = [100 - each["test_error"] for each in found]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train/CLASS/ and test/CLASS/")
    parser.add_argument("--budget", type=Budget.of, default=Budget(flops=2e14), help="600s, 8h or 1e14 (FLOPs)")
    parser.add_argument("--lrs", type=numbers(float), default=[5e-3], help="learning rates of both")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="of both")
    parser.add_argument("--average", type=float, default=0.0, help="decay of an average of the weights, 0 for none")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--vit-patch-size", type=int, default=4)
    parser.add_argument("--vit-dim", type=int, default=192)
    parser.add_argument("--vit-heads", type=int, default=6)
    parser.add_argument("--part", type=part_of, help="K/N: train the K-th of N shares of the first trainings only")
    sizes = {"layers": "(1)2(1)2(1)2", "dim": 96, "latent_dim": 192, "heads": 4, "latent_heads": 6}
    add_options(parser, **sizes, latents_per_group=4, drop_path=0.0)
    arguments = parser.parse_args()
    if arguments.part and arguments.budget.flops is None:
        parser.error("--part takes a --budget in FLOPs: what a training spends must not hang on the others")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trunk = {name: getattr(arguments, name) for name in arguments.trunk}

    def fit() -> FITImageEncoder:
        size = (SIDE, arguments.group_size, arguments.patch_size)
        model = FITImageEncoder(TrunkConfig(**trunk), *size, channels=CHANNELS, num_classes=CLASSES)
        zero_trunk_branches(model.trunk)
        return model

    vit = vit_like(fit(), arguments.vit_patch_size, arguments.vit_dim, arguments.vit_heads, arguments.drop_path)
    makers: dict[str, Callable[[], nn.Module]] = {"FIT": fit, "ViT": vit}
    for name, make in makers.items():
        print(f"{name}: {count_parameters(make()):,} parameters, {image_flops(make()):.3g} FLOPs of an image")
    train, held, test = read(arguments.data)
    print(f"{len(train[1]):,} images to train on, {len(held[1]):,} held out, {len(test[1]):,} to test", flush=True)

    def entry(name: str, lr: float, seed: int) -> Entry:
        options: dict[str, Any] = {each: getattr(arguments, each) for each in ("average", "device", "optimizer")}
        settings = Settings(lr, arguments.batch, mixed=not arguments.float32, seed=seed, **options)
        return Entry(f"{name}, rate {lr:g}", makers[name], settings, ImageRun)

    race = Race(
        arguments.budget,
        batch=partial(batch_of, train),
        evaluate=lambda run: run.error(held),
        measure=lambda run: measure(run, held, test),
        folder=arguments.output,
        points=arguments.points,
    )
    kinds = {name: [entry(name, lr, 0) for lr in arguments.lrs] for name in makers}
    if arguments.part:
        number, count = arguments.part
        for each in [one for entries in kinds.values() for one in entries][number - 1 :: count]:
            race.enter(each)
        return
    found = {}
    for name, entries in kinds.items():
        best = race.best(entries)
        found[name] = [race.enter(entry(name, best.settings.lr, seed)) for seed in range(arguments.seeds)]
    print("| network | parameters | FLOPs of an image | steps | seconds | FLOPs | accuracy, % |")
    print("|---|---|---|---|---|---|---|")
    for each in race.results:
        print(f"| {each['name']} | {each['parameters']:,} | {each['image_flops']:.3g} | {each['steps']} ", end="")
        print(f"| {each['seconds']:.0f} | {each['flops']:.3g} | {100 - each['test_error']:.2f} |")
    print(f"\nFIT {accuracies(found['FIT'])}, ViT {accuracies(found['ViT'])} percent of the test part")


if __name__ == "__main__":
    main()
