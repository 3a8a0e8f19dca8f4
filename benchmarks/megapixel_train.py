"""Megapixel MNIST on an accelerator: a curriculum of canvas sizes, painted on the device, and one model for all sizes.

    python benchmarks/megapixel_train.py --mnist FOLDER --device cuda --output FOLDER \\
        --stages 192:90s:64:1e-3 512:90s:64:1e-3 1500:120s:32:5e-4 --tests 512:1000 1500:1000 6400:50 25600:4

FOLDER holds MNIST's four idx files. A stage is SIZE:LENGTH:BATCH:RATE, its length in steps or, with an s, in seconds.
The canvases are the 5,000 of `fitformer.data`'s source of each size: MNIST, noise and layouts are on the device, and a
batch is painted there. Each time a canvas is seen it lies at another offset on the grid of groups (up to a group less
a pixel), on black, so groups' borders cut its digits at varying places. Black groups are skipped, but for as many as
make the canvases of a batch equal. Tests run through the library's own dataset and model, whose source paints the test
canvases. One JSON object a line; the model goes to OUTPUT/model."""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fitformer import FITImageEncoder
from fitformer.data.build import build_dataset
from fitformer.data.datasets.megapixel import SIDE, MegapixelSource
from fitformer.data.order import step_batch
from fitformer.data.settings import ImageData
from fitformer.execution import Streamed, plain
from fitformer.models.config import TrunkConfig
from fitformer.models.initialization import zero_trunk_branches
from fitformer.patching.any_size import GroupedImage, to_signal
from fitformer.patching.image import image_to_groups
from fitformer.profiling.flops import count_parameters
from fitformer.tasks.optimizers import parameter_groups

CLASSES = 10
# Groups of an image that are run at once; more are streamed.
MOST_GROUPS = 2048


@dataclass(frozen=True)
class Stage:
    """Training on canvases of one size: steps or seconds, batch, peak of the learning rate."""

    size: int
    steps: int | None
    seconds: float | None
    batch: int
    lr: float

    @classmethod
    def of(cls, text: str) -> "Stage":
        """Read `SIZE:LENGTH:BATCH:RATE`."""
        size, length, batch, lr = text.split(":")
        seconds = float(length[:-1]) if length.endswith("s") else None
        return cls(int(size), int(length) if seconds is None else None, seconds, int(batch), float(lr))

    def share(self, steps: int, seconds: float) -> float:
        """The share of the stage that is done."""
        return steps / self.steps if self.steps is not None else seconds / self.seconds  # type: ignore[operator]


@dataclass(frozen=True)
class Layouts:
    """What lies where on some canvases: pieces int64 (k, p), the digits first, and their corners (k, p, 2)."""

    pieces: Tensor
    corners: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Rows:
    """Some groups of a batch, with about as many patches each, and of these the ones that are not black.

    Attributes:
        number: of the groups, in b * t, int64 `(1, r)`. tokens: raw, uint8 `(1, r, k, token_dim)`.
        where: places of the patches in their groups, int64 `(1, r, k)`. mask: which are there, and do not fill up.
    """

    number: Tensor
    tokens: Tensor
    where: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """Some canvases without what is black.

    Attributes:
        rows: all groups, some at a time. seen: which groups are there, and do not fill up, booleans `(b, t)`.
        coords: rows and columns of the groups, int64 `(b, t, 2)`. labels: int64 `(b,)`.
    """

    rows: list[Rows]
    seen: Tensor
    coords: Tensor
    labels: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        yield from (self.seen, self.coords, self.labels)
        for rows in self.rows:
            yield from (rows.number, rows.tokens, rows.where, rows.mask)


class Painter:
    """Paints batches of the canvases of one size on a device, as groups of raw tokens.

    Args:
        source: the canvases. network: says how they are cut. device: to paint on.
        parts: in which groups with about as many patches are run together.
        reach: groups by which a canvas may be moved from the origin of the grid, down and to the right.
    """

    def __init__(
        self, source: MegapixelSource, network: FITImageEncoder, device: str, parts: int, reach: int = 0
    ) -> None:
        (self.group, _), self.patch = network.patch_grid.group_size, network.patch_grid.patch_size
        self.device, self.parts, self.reach, self.size = device, parts, reach, source.size[0]
        every = [source.layout(index) for index in range(len(source))]
        count = len(source.mnist.images)
        pieces = np.stack([np.concatenate([each.digits, each.patterns + count]) for each in every])
        corners = np.stack([np.concatenate([each.corners, each.noise_corners]) for each in every])
        # Only the digits that are used, so that the device holds few.
        used, pieces = np.unique(pieces, return_inverse=True)
        drawn = np.concatenate([source.mnist.images, source.noise])[used][..., 0]
        self.drawn = torch.from_numpy(drawn).to(device)
        labels = torch.tensor([each.label for each in every])
        self.layouts = Layouts(
            *(
                each.to(device)
                for each in (torch.from_numpy(pieces.reshape(corners.shape[:2])), torch.from_numpy(corners), labels)
            )
        )
        self.digits = every[0].digits.size
        self.side = (self.size + self.group - 1 + self.group - 1) // self.group

    def __len__(self) -> int:
        return len(self.layouts.labels)

    def ahead(self, batch: int, seed: int) -> Iterator[Batch]:
        """The batches of all steps, functions of (seed, step); on a GPU beside the step before."""
        random, device = torch.Generator(self.device), torch.device(self.device)
        side = torch.cuda.Stream() if device.type == "cuda" else None
        for step in count():
            places = torch.tensor([index for _, index in step_batch(step, len(self), batch, seed)])
            random.manual_seed(seed * 10**9 + step)
            if side is None:
                yield self.paint(places, random)
                continue
            with torch.cuda.stream(side):
                painted = self.paint(places.to(device), random)
            torch.cuda.current_stream().wait_stream(side)
            for each in painted.tensors():
                each.record_stream(torch.cuda.current_stream())
            yield painted

    def paint(self, places: Tensor, random: torch.Generator) -> Batch:
        """Paint the canvases of these numbers (b,)."""
        device, b, g = places.device, len(places), self.group
        pieces, corners = self.layouts.pieces[places], self.layouts.corners[places]
        offset = torch.randint(g, (b, 1, 2), generator=random, device=device)
        canvas = torch.zeros(b, self.side * g, self.side * g, dtype=torch.uint8, device=device)
        each, across = torch.arange(b, device=device)[:, None, None, None], torch.arange(SIDE, device=device)
        rows, columns = ((corners + offset)[..., None] + across).unbind(2)
        # Noise comes last and piece by piece, as it covers what lies below.
        total = pieces.shape[1]
        for few in [slice(0, self.digits), *(slice(k, k + 1) for k in range(self.digits, total))]:
            canvas[each, rows[:, few, :, None], columns[:, few, None, :]] = self.drawn[pieces[:, few]]
        groups = canvas.view(b, self.side, g, self.side, g).transpose(2, 3).flatten(1, 2)
        held = groups.flatten(2).amax(-1) > 0
        kept = held.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(held.sum(1).max())]
        coords = torch.stack([kept // self.side, kept % self.side], dim=-1)
        if self.reach:
            coords = coords + torch.randint(self.reach + 1, (b, 1, 2), generator=random, device=device)
        seen = held.gather(1, kept)
        chosen = groups[torch.arange(b, device=device)[:, None], kept][seen]
        return Batch(self._rows(chosen, seen), seen, coords, self.layouts.labels[places])

    def _rows(self, chosen: Tensor, seen: Tensor) -> list[Rows]:
        """The groups (r, rows, columns) that are seen, those with few patches and those with many apart."""
        tokens = image_to_groups(chosen[..., None], self.group, self.patch)[:, 0]
        held = tokens.amax(-1) > 0
        counts, order = held.sum(-1).sort()
        found = held.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        numbers = seen.flatten().nonzero()[:, 0]
        parts = order.tensor_split(self.parts)
        most = counts[torch.tensor([len(part) for part in parts], device=counts.device).cumsum(0) - 1].tolist()
        rows = []
        for part, k in zip(parts, most):
            where, mask = found.indices[part, :k], found.values[part, :k].bool()
            rows.append(Rows(numbers[part][None], tokens[part[:, None], where][None], where[None], mask[None]))
        return rows


def logits_of(network: FITImageEncoder, batch: Batch) -> Tensor:
    """Logits (b, classes) of a batch, as `FITImageEncoder.forward` has them of images that have these patches only."""
    encoder, trunk = network.encoder, network.trunk
    xs = [encoder.stem(to_signal(rows.tokens)) + trunk.position()[rows.where] for rows in batch.rows]
    latents = trunk.initial_latents(*batch.coords.shape[:2], batch.coords)
    order = torch.cat([rows.number[0] for rows in batch.rows])
    seen = batch.seen.repeat_interleave(trunk.latents_per_group, dim=1)[:, None, None]
    keys = trunk.dropout_keys(*batch.seen.shape)
    for block in trunk.blocks:
        flat, read = latents.flatten(0, 1), []
        for k, rows in enumerate(batch.rows):
            own, key = flat[rows.number], None if keys is None else keys.flatten()[rows.number]
            xs[k], own = block.group_phase(xs[k], own, own, rows.mask, key)
            read.append(own[0])
        latents = flat.index_copy(0, order, torch.cat(read).to(flat.dtype)).view_as(latents)
        latents = block.global_phase(latents, call=lambda layer, x, _, *rest: layer(x, seen, *rest))
    assert network.head is not None
    each = encoder.latent_norm(latents).mean(2) * batch.seen[..., None]
    return network.head(each.sum(1) / batch.seen.sum(1, keepdim=True)).float()


def rate(share: float, warmup: float, end: float) -> float:
    """The learning rate as a share of its peak: up on a line, then down on a line."""
    return max(share / warmup, 1e-2) if share < warmup else 1 - min((share - warmup) / (1 - warmup), 1.0) * (1 - end)


def precision(device: str) -> Any:
    """bf16 on an accelerator, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


@dataclass
class Training:
    """A network in training, and the average of its weights."""

    network: FITImageEncoder
    options: argparse.Namespace

    def __post_init__(self) -> None:
        made = self.options
        self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(made.average))
        groups = parameter_groups(self.network, made.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, made.beta2), fused=True)

    def run(self, stage: Stage, number: int, settings: ImageData) -> None:
        """One stage, from its first step to its last."""
        made, network = self.options, self.network
        source = build_dataset(settings, "train").source
        painter = Painter(source, network, made.device, made.parts, made.reach if number >= made.reach_from else 0)
        batches = painter.ahead(stage.batch, made.seed + number)
        began, steps, seen, shown = time.perf_counter(), 0, 0, []
        while (share := stage.share(steps, time.perf_counter() - began)) < 1:
            batch = next(batches)
            for group in self.optimizer.param_groups:
                group["lr"] = stage.lr * rate(share, made.warmup, made.end)
            with precision(made.device):
                logits = logits_of(network, batch)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=made.smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.averaged.update_parameters(network)
            steps, seen = steps + 1, seen + stage.batch
            shown.append(torch.stack([loss.detach(), (logits.argmax(-1) == batch.labels).float().mean()]))
            if steps % made.log_every == 0:
                mean = torch.stack(shown).mean(0).tolist()
                shown.clear()
                say(stage=number, size=stage.size, step=steps, canvases=seen, seconds=time.perf_counter() - began,
                    groups=batch.seen.shape[1], loss=mean[0], accuracy=mean[1])  # fmt: skip


def say(**values: Any) -> None:
    """One JSON object a line."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


@torch.no_grad()
def test(network: FITImageEncoder, settings: ImageData, most: int, options: argparse.Namespace) -> None:
    """Accuracy on the first canvases of the test part, painted and read by the library, one by one."""
    began, network = time.perf_counter(), network.eval()
    canvases = build_dataset(settings, "test")
    canvases.group_for(network.patch_grid, 0, settings)

    def grouped(index: int) -> tuple[GroupedImage, int]:
        return canvases[index]["image"], int(canvases.source.labels[index])

    right, nats, groups, k = 0, 0.0, 0, min(most, len(canvases))
    with ThreadPoolExecutor(options.workers) as threads:
        for image, label in threads.map(grouped, range(k)):
            network.set_execution(Streamed(slice_groups=MOST_GROUPS) if image.num_groups > MOST_GROUPS else plain)
            with precision(options.device):
                logits = network([image])[0].float()
            right += int(logits.argmax()) == label
            nats -= float(logits.log_softmax(-1)[label])
            groups += image.num_groups
    say(test=settings.image_size, canvases=k, accuracy=right / k, nats=nats / k, groups=groups / k,
        seconds=time.perf_counter() - began)  # fmt: skip
    network.train()


@torch.no_grad()
def quick_test(network: FITImageEncoder, settings: ImageData, device: str, batch: int = 50) -> None:
    """Accuracy on the whole test part, painted on the device: for probes."""
    began, network = time.perf_counter(), network.eval()
    painter, random = Painter(build_dataset(settings, "test").source, network, device, 4), torch.Generator(device)
    right = 0
    for places in torch.arange(len(painter), device=device).split(batch):
        painted = painter.paint(places, random.manual_seed(int(places[0])))
        with precision(device):
            right += int((logits_of(network, painted).argmax(-1) == painted.labels).sum())
    say(quick_test=settings.image_size, accuracy=right / len(painter), seconds=time.perf_counter() - began)
    network.train()


def zero_branches(network: FITImageEncoder, position_std: float) -> None:
    """Residual branches that begin at zero, and positions as large as the tokens that they are added to."""
    nn.init.normal_(network.trunk.position.weight, std=position_std)
    zero_trunk_branches(network.trunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True, help="folder of MNIST's four idx files")
    parser.add_argument("--output", type=Path, help="folder for the model")
    parser.add_argument("--init-from", type=Path, help="a model to go on from")
    parser.add_argument("--stages", type=Stage.of, nargs="*", default=[], metavar="SIZE:LENGTH:BATCH:RATE")
    parser.add_argument("--tests", nargs="*", default=[], metavar="SIZE:COUNT")
    parser.add_argument("--layers", default="(2)1(2)3")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--latent-dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--latent-heads", type=int, default=6)
    parser.add_argument("--latents-per-group", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--position", default="learned")
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--xattn-with-mlp", action="store_true")
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--reference-init", action="store_true", help="the reference's weights to start from")
    parser.add_argument("--position-std", type=float, default=0.5)
    parser.add_argument("--average", type=float, default=0.99)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--beta2", type=float, default=0.98)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--end", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.05)
    parser.add_argument("--reach", type=int, default=400, help="groups that canvases are moved by at most")
    parser.add_argument("--reach-from", type=int, default=1, help="first stage in which they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4, help="threads that paint test canvases")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--parts", type=int, default=4, help="of a batch's groups, which are run together")
    parser.add_argument("--quick", action="store_true", help="test after each stage, painted on the device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trunk = TrunkConfig(
        latent_position="row_column",
        **{name: getattr(options, name) for name in TrunkConfig.names() if name in vars(options)},
    )
    if options.init_from:
        network = FITImageEncoder.from_pretrained(options.init_from)
    else:
        network = FITImageEncoder(
            trunk, None, options.group_size, options.patch_size, channels=1, num_classes=CLASSES
        )  # fmt: skip
        if not options.reference_init:
            zero_branches(network, options.position_std)
    network.to(options.device).train()
    say(parameters=count_parameters(network), torch=torch.__version__, device=device_name(options.device))

    def settings(size: int) -> ImageData:
        return ImageData(
            source="megapixel-mnist",
            path=options.mnist,
            image_size=size,
            background="black",
            tolerance=0.0,
            background_patches=True,
        )

    training = Training(network, options)
    for number, stage in enumerate(options.stages):
        training.run(stage, number, settings(stage.size))
        if options.quick:
            quick_test(training.averaged.module, settings(stage.size), options.device)
    learned = training.averaged.module if options.stages else network
    if options.output:
        learned.save_pretrained(options.output / "model")
    for size, most in tests(options.tests):
        test(learned, settings(size), most, options)


def tests(asked: list[str]) -> Iterator[tuple[int, int]]:
    """Sizes and numbers of canvases."""
    for each in asked:
        size, most = map(int, each.split(":"))
        yield size, most


def device_name(device: str) -> str:
    """What the training runs on."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
