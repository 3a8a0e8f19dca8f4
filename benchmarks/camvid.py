"""CamVid: FIT's segmenter against a U-Net on a ResNet-34 of equal compute, the same training of both, in one run.

    pip install 'segmentation_models_pytorch>=0.5'
    python benchmarks/camvid.py --images CamVid/images --labels CamVid/labels --device cuda --output FOLDER

The folders are those of the recipe `camvid-segment`, whose reading this is: 11 classes, 360 x 480 pixels, the parts of
the SegNet tutorial. Both networks start from random weights and get the same batches: images scaled by `--scales`, cut
out at a place drawn at random, with no labels beyond their edges, flipped, and changed in brightness, contrast and
saturation, all on the device, which holds every image. The loss is the task's, cross-entropy and Dice. A budget in
seconds is FIT's, and the U-Net gets the operations, forward and backward, that FIT spent. Curves and the choice among
`--lrs` are of the validation part; the test part is read once, by what is trained to the end. Its mIoU is made of one
count over all its pixels, of the classes of the images as they are, and of these and their mirror images together."""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from budgeted_training import Budget, Result, Run, Settings, autocast
from race import Entry, Race, add_options, numbers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fitformer import FITImageSegmenter
from fitformer.config.load import load
from fitformer.data.build import build_dataset
from fitformer.data.labels import UNLABELLED
from fitformer.data.order import example_generator, step_batch
from fitformer.diffusion import pixels_to_signal
from fitformer.errors import InputError
from fitformer.models.config import TrunkConfig
from fitformer.models.initialization import zero_trunk_branches
from fitformer.profiling.flops import count_parameters
from fitformer.tasks._pixel_sums import confusions, loss_sums, losses, shares_of

CHANNELS = 3
# Brightness, contrast and saturation are scaled by 1 - JITTER to 1 + JITTER.
JITTER = 0.3
# How much of each colour its grey has (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)
# A U-Net halves five times.
MULTIPLE = 32
# Images that are measured at once.
MEASURED = 16
Pictures = tuple[Tensor, Tensor]


class UNet(nn.Module):
    """segmentation_models_pytorch's U-Net on a ResNet-34, from random weights, of images of any size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise InputError(
                f"the U-Net is segmentation_models_pytorch's, which cannot be imported ({error}): pip install "
                "segmentation_models_pytorch, or leave it out with --networks FIT"
            ) from error
        self.network = smp.Unet("resnet34", encoder_weights=None, in_channels=CHANNELS, classes=classes)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(b, classes, H, W)` of images `(b, H, W, 3)` in -1 .. 1."""
        rows, columns = images.shape[1:3]
        padded = F.pad(images.permute(0, 3, 1, 2), (0, -columns % MULTIPLE, 0, -rows % MULTIPLE))
        return self.network(padded)[:, :, :rows, :columns]


def read(images: Path, labels: Path, size: tuple[int, int], device: str) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """Of each part images uint8 `(k, H, W, 3)` and classes of their pixels uint8 `(k, H, W)`; the classes' names."""
    changed = {"path": images, "labels": labels, "image_size": [*size], "augmentation": "none"}
    recipe = load("camvid-segment", [f"--data.{name}={value}" for name, value in changed.items()])
    found = {}
    for part in ("train", "val", "test"):
        dataset = build_dataset(recipe.data, part)
        items = [dataset[k] for k in range(len(dataset))]
        pixels, classes = (torch.stack([item[name] for item in items]) for name in ("image", "labels"))
        found[part] = pixels.to(device), classes.to(device)
    return found, recipe.data.classes


def batch_of(data: Pictures, scales: tuple[float, float], settings: Settings, step: int) -> Pictures:
    """Images of a step in -1 .. 1 and their classes, moved and coloured: a pure function of (seed, step).

    Args:
        data: images uint8 and classes.
        scales: the least and the most that an image is scaled by; the logarithm is drawn uniformly.
        settings, step: of the training.
    """
    images, labels = data
    least, most = scales
    device = images.device
    places = torch.tensor([index for _, index in step_batch(step, len(images), settings.batch, settings.seed)])
    random = example_generator(settings.seed, 0, step)
    drawn = torch.from_numpy(random.random((7, settings.batch), dtype="float32")).to(device)
    images, labels = images[places.to(device)], labels[places.to(device)]
    scale = least * (most / least) ** drawn[0]
    moved = moved_pictures((images, labels), scale, 2 * drawn[1:3] - 1, drawn[3] < 0.5)
    factors = 1 + JITTER * (2 * drawn[4:] - 1)
    return coloured(moved[0], *factors), moved[1]


def moved_pictures(pictures: Pictures, scale: Tensor, place: Tensor, flipped: Tensor) -> Pictures:
    """Images uint8 as float32 in -1 .. 1, 0 beyond their edges, and classes, each scaled and perhaps flipped.

    Args:
        pictures: images and classes of their pixels.
        scale: of each image `(b,)`; above 1 a part of it fills the frame, below 1 it is a part of the frame.
        place: down and across `(2, b)`, -1 .. 1: which part, from the first rows or columns to the last.
        flipped: booleans `(b,)`, left for right.
    """
    images, labels = pictures
    size, reach = images.shape[:3], (1 - 1 / scale).abs() * place
    zeros = torch.zeros_like(scale)
    rows = [torch.stack([torch.where(flipped, -1, 1) / scale, zeros, reach[1]], dim=1)]
    rows.append(torch.stack([zeros, 1 / scale, reach[0]], dim=1))
    grid = F.affine_grid(torch.stack(rows, dim=1), [size[0], 1, *size[1:]], align_corners=False)
    # Zeros come in from beyond the edge: there classes are counted down from that of no label.
    counted = (UNLABELLED - labels.float())[:, None]
    classes = UNLABELLED - F.grid_sample(counted, grid, mode="nearest", align_corners=False)[:, 0]
    signal = F.grid_sample(pixels_to_signal(images).permute(0, 3, 1, 2), grid, align_corners=False)
    return signal.permute(0, 2, 3, 1).contiguous(), classes.round().to(torch.uint8)


def coloured(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Images in -1 .. 1 with factors `(b,)` on all, on contrast with their mean grey, on colour with their grey."""
    brightness, contrast, saturation = (each[:, None, None, None] for each in (brightness, contrast, saturation))
    pixels = (images + 1) / 2 * brightness
    grey = (pixels * pixels.new_tensor(GREY)).sum(-1, keepdim=True)
    pixels = grey + saturation * (pixels - grey)
    mean = grey.mean((1, 2, 3), keepdim=True)
    return (mean + contrast * (pixels - mean)).clamp(0, 1) * 2 - 1


def step_flops(network: nn.Module, size: tuple[int, int]) -> float:
    """Operations of a training step on one image, forward and backward, by torch's counter; nothing is computed."""
    shapes = copy.deepcopy(network).to("meta").train()
    math = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        shapes(torch.zeros(1, *size, CHANNELS, device="meta")).sum().backward()
    return float(counter.get_total_flops())


def log_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights `(classes,)` of 1 / log(1.02 + share of pixels) (arXiv 1606.02147), whose mean over pixels is 1."""
    counts = torch.bincount(labels.flatten(), minlength=UNLABELLED + 1)[:classes].double()
    shares = counts / counts.sum()
    weights = 1 / (1.02 + shares).log()
    return (weights / (weights * shares).sum()).float()


@dataclass
class PixelRun(Run):
    """The training of a network that says a class of every pixel.

    Attributes:
        size: rows and columns. classes: how many. weights: of them in the cross-entropy `(classes,)`.
    """

    size: tuple[int, int] = (360, 480)
    classes: int = 11
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.flops_of_image = step_flops(self.network, self.size)
        super().__post_init__()

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Of images in -1 .. 1, in float32 `(b, classes, H, W)`."""
        with autocast(self.settings.mixed, 0, self.settings.device):
            return network(images).float()

    def loss(self, batch: Pictures) -> Tensor:
        """Cross-entropy in nats and Dice loss, means over images."""
        images, labels = batch
        cross, dice, _ = losses(loss_sums(self.logits(self.network, images)[:, None], labels[:, None], self.weights))
        return cross + dice

    def cost(self, batch: Pictures) -> float:
        """Operations of a step."""
        return self.flops_of_image * len(batch[1])

    @torch.no_grad()
    def confusion(self, data: Pictures, *, mirrored: bool = False) -> Tensor:
        """Labelled pixels of each class taken for each, `(classes, classes)` float64 on the CPU, rows true.

        Args:
            data: images uint8 and classes.
            mirrored: take the class by the mean probabilities of an image and of its mirror image.
        """
        network = self.measured().eval()
        found = torch.zeros(self.classes, self.classes, dtype=torch.float64)
        for images, labels in zip(*(each.split(MEASURED) for each in data), strict=True):
            signal = pixels_to_signal(images)
            said = self.logits(network, signal).softmax(1)
            if mirrored:
                said += self.logits(network, signal.flip(2)).softmax(1).flip(3)
            found += confusions(said.argmax(1), labels, self.classes).sum(0).cpu()
        network.train()
        return found


def intersections(confusion: Tensor, classes: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """mIoU and IoU of each class that occurs, in percent."""
    right, true, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    each = {name: 100 * share for name, share in shares_of(right, true + claimed - right, classes).items()}
    return sum(each.values()) / max(len(each), 1), each


def measure(run: PixelRun, parts: dict[str, Pictures], classes: tuple[str, ...]) -> Result:
    """What mIoU of the validation part lacks to 100, which chooses, that of the test part, which counts, the cost."""
    val, _ = intersections(run.confusion(parts["val"]), classes)
    confusion = run.confusion(parts["test"])
    test, by_class = intersections(confusion, classes)
    mirrored, _ = intersections(run.confusion(parts["test"], mirrored=True), classes)
    return {
        "value": 100 - val,
        "test_miou": test,
        "test_miou_mirrored": mirrored,
        "test_accuracy": 100 * float(confusion.diagonal().sum() / confusion.sum()),
        "test_iou_by_class": by_class,
        "test_images": len(parts["test"][1]),
        "step_flops_of_image": run.flops_of_image,
    }


def table(results: list[Result], classes: tuple[str, ...]) -> Iterator[str]:
    """Lines of the results, and of the IoU of each class."""
    yield "| network | parameters | steps | seconds | FLOPs | mIoU of val | of test | with mirror images | accuracy |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for each in results:
        yield (
            f"| {each['name']} | {each['parameters']:,} | {each['steps']} | {each['seconds']:.0f} "
            f"| {each['flops']:.3g} | {100 - each['value']:.2f} | {each['test_miou']:.2f} "
            f"| {each['test_miou_mirrored']:.2f} | {each['test_accuracy']:.2f} |"
        )
    yield ""
    yield f"| IoU of the test part | {' | '.join(classes)} |"
    yield "|---" * (1 + len(classes)) + "|"
    for each in results:
        shares = [f"{each['test_iou_by_class'].get(name, 0):.1f}" for name in classes]
        yield f"| {each['name']} | {' | '.join(shares)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of train/, val/ and test/")
    parser.add_argument("--labels", type=Path, required=True, help="folder of their masks, likewise")
    parser.add_argument("--image-size", type=numbers(int), default=[360, 480], help="rows,columns")
    parser.add_argument("--budget", type=Budget.of, default=Budget(seconds=240), help="600s, 8h or 1e14 (FLOPs)")
    parser.add_argument("--networks", type=lambda text: text.split(","), default=["FIT", "U-Net"])
    parser.add_argument("--lrs", type=numbers(float), default=[1e-3], help="learning rates of both")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--average", type=float, default=0.998, help="decay of an average of the weights, 0 for none")
    parser.add_argument("--scales", type=numbers(float), default=[0.7, 2.0], help="least,most scale of an image")
    parser.add_argument("--class-weights", choices=["none", "log"], default="none")
    parser.add_argument("--initialization", choices=["reference", "zero_branches"], default="zero_branches")
    parser.add_argument("--group-size", type=int, default=120)
    parser.add_argument("--patch-size", type=int, default=6)
    parser.add_argument("--refinement", type=int, default=32)
    sizes = {"layers": "(2)2(2)2(2)2(3)", "dim": 128, "latent_dim": 256, "heads": 4, "latent_heads": 8}
    add_options(parser, **sizes, latents_per_group=32, drop_path=0.0)
    parser.add_argument("--position", choices=["learned", "sin_cos", "sin_cos2d"], default="learned")
    parser.add_argument("--latent-position", choices=["learned", "sin_cos", "row_column"], default="learned")
    parser.set_defaults(seeds=1)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True
    size = tuple(arguments.image_size)
    options = [*arguments.trunk, "position", "latent_position"]
    trunk = TrunkConfig(**{name: getattr(arguments, name) for name in options})
    parts, classes = read(arguments.images, arguments.labels, size, arguments.device)

    def fit() -> FITImageSegmenter:
        cut = (size, arguments.group_size, arguments.patch_size)
        model = FITImageSegmenter(trunk, *cut, num_classes=len(classes), refinement=arguments.refinement)
        if arguments.initialization == "zero_branches":
            zero_trunk_branches(model.trunk)
        return model

    known: dict[str, Callable[[], nn.Module]] = {"FIT": fit, "U-Net": lambda: UNet(len(classes))}
    if unknown := [name for name in arguments.networks if name not in known]:
        parser.error(f"--networks has {unknown[0]!r}; choose among {', '.join(known)}")
    for name in arguments.networks:
        network = known[name]()
        flops = step_flops(network, size)
        print(f"{name}: {count_parameters(network):,} parameters, {flops:.3g} FLOPs of a training step on an image")
    print(", ".join(f"{len(labels):,} images to {part}" for part, (_, labels) in parts.items()), flush=True)
    weights = log_weights(parts["train"][1], len(classes)) if arguments.class_weights == "log" else None
    start = partial(PixelRun, size=size, classes=len(classes), weights=weights)

    def entry(name: str, lr: float, seed: int) -> Entry:
        options: dict[str, Any] = {"average": arguments.average, "device": arguments.device, "seed": seed}
        options["weight_decay"] = arguments.weight_decay
        settings = Settings(lr, arguments.batch, mixed=not arguments.float32, **options)
        return Entry(f"{name}, rate {lr:g}", known[name], settings, start)

    race = Race(
        arguments.budget,
        batch=partial(batch_of, parts["train"], tuple(arguments.scales)),
        evaluate=lambda run: 100 - intersections(run.confusion(parts["val"]), classes)[0],
        measure=lambda run: measure(run, parts, classes),
        folder=arguments.output,
        points=arguments.points,
    )
    for name in arguments.networks:
        best = race.best([entry(name, lr, 0) for lr in arguments.lrs])
        for seed in range(arguments.seeds):
            race.enter(entry(name, best.settings.lr, seed))
    print("\n".join(table(race.results, classes)))


if __name__ == "__main__":
    main()
