"""Train a U-Net with an encoder that has seen ImageNet to name each place's colour class, rare colours counting for more.

    accelerate launch train/efficient_unet.py --dataset PHOTOS
    accelerate launch train/efficient_unet.py --dataset PHOTOS --encoder efficientnet_lite2.safetensors
    accelerate launch train/efficient_unet.py --dataset PHOTOS --start CHECKPOINT --learning-rate 5e-4

The loss is that of Zhang et al., "Colorful Image Colorization" (2016), section 2.2: cross entropy to the five classes nearest
to the true colour, weighted by how rare it is; and what is painted from the classes should look like the truth, to a network
that knows things, and be as colourful. The pretrained encoder follows at a tenth of the learning rate; its depthwise kernels
and first stages stay as ImageNet left them, which on a CPU makes a step twice as fast. All pictures are turned and stretched,
some are four in one, for variety, and some are shown to it as plates and faded prints, so that it knows those too.
EXPERIMENTS.md says what else was tried.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, l1_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import supervised
from colorize.color import AB_SCALE
from colorize.models import EfficientUNet, EfficientUNetConfig
from colorize.models.efficient_unet import Encoder
from data import Photos, PhotoStream, loader, seen_as, to_network, varied
from pretrained import HOME, Perceptual, freeze, load_encoder
from run import Run, load, parse, parser

NEAREST, SPREAD = 5, 5.0  # classes that share a colour, and the deviation of their Gaussian weights in units of a*, b*
MARGIN = 2  # places along the edges whose colourfulness does not count
SIDE = 2 * int(AB_SCALE) + 1  # of the table from whole a*, b* to classes

SUMMARY = """A U-Net with an EfficientNet-{encoder} encoder from ImageNet and criss-cross attention, which gives every place of
a photograph probabilities of {classes} colours, and paints their annealed mean (temperature {temperature})."""

FAILURES = """It takes each place for what is likeliest there, and is sure of it: patches of a wrong colour on rocks, water
and cloth, skin tones where there is no skin. What a photograph cannot tell (clothes, cars, walls) is guessed, mostly brown or
gray. Fine detail takes the colour of what is around."""


def flags() -> argparse.ArgumentParser:
    f = parser(__doc__.splitlines()[0], run=Path("runs/efficient-unet"), batch_size=32, validation_pictures=500)
    f.add_argument("--encoder", default=HOME, help="weights of EfficientNet-Lite0 or -Lite2: a .safetensors file or a Hub id")
    f.add_argument("--encoder-rate", type=float, default=0.1, help="its share of the learning rate")
    f.add_argument("--frozen-stages", type=int, default=2, help="of the encoder's 7, the first ones, which do not learn")
    f.add_argument("--width", type=int, default=64, help="channels of the decoder at half the size")
    f.add_argument("--stride", type=int, default=4, choices=(2, 4), help="pixels between two places that are given a colour")
    f.add_argument("--temperature", type=float, default=0.38, help="of the annealed mean")
    f.add_argument("--uniform", type=float, default=0.9, help="how alike colours count: 0 by their rarity, 1 all the same")
    f.add_argument("--prior-pictures", type=int, default=1024, help="training pictures from which rarity is estimated")
    f.add_argument("--mosaics", type=float, default=0.3, help="share of pictures that are four in one, the rest turned; 0: no")
    f.add_argument("--old-prints", type=float, default=0.4, help="share of the pictures that are shown as old, faded prints")
    f.add_argument("--class-weight", type=float, default=1.0, help="of the cross entropy")
    f.add_argument("--l1-weight", type=float, default=0.0, help="of the L1 distance of the painted ab")
    f.add_argument("--colourfulness-weight", type=float, default=10.0, help="of how far its colourfulness is from the truth's")
    f.add_argument("--perceptual-weight", type=float, default=1.0, help="of how different it looks to the encoder's network")
    f.add_argument("--ema", type=float, default=0.998, help="decay of the running mean of the weights, which is what is kept")
    supervised.flags(f).set_defaults(learning_rate=1e-3, warmup_steps=100, weight_decay=1e-2, validate_every=500)
    f.set_defaults(image_size=192, epochs=1.0, epoch_steps=4000)  # one warm-up and one cosine over the whole run
    return f


def running_mean(decay: float):
    """For `AveragedModel`: an exponential mean that soon forgets the random weights of the first steps."""

    def update(kept: list, current: list, updates) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(kept, current, n)

    return update


class Targets(nn.Module):
    """What the logits are held against: a table from whole a*, b* to the classes that share the colour, and their weights.

    Zhang et al., section 2.1 for the shares, 2.2 for the weights. As the table knows all distances, a step computes none.
    """

    def __init__(self, colours: torch.Tensor):
        """`colours` (Q, 2): ab of the classes in [-1, 1]."""
        super().__init__()
        units = torch.arange(SIDE) - AB_SCALE
        distance, classes = torch.cdist(torch.cartesian_prod(units, units), colours * AB_SCALE).topk(NEAREST, largest=False)
        self.register_buffer("classes", classes)  # (SIDE * SIDE, NEAREST), the very nearest first
        self.register_buffer("shares", torch.softmax(-(distance**2) / (2 * SPREAD**2), dim=1))
        self.register_buffer("prior", torch.full((len(colours),), 1 / len(colours)))  # how often each class is seen
        self.register_buffer("weights", torch.ones(len(colours)))

    def cells(self, ab: torch.Tensor) -> torch.Tensor:
        """ab (B, 2, h, w) in [-1, 1] -> rows of the table (B * h * w,)."""
        a, b = ((ab + 1) * AB_SCALE).round().long().clamp(0, SIDE - 1).unbind(1)
        return (a * SIDE + b).flatten()

    def count(self, truths: Iterable[torch.Tensor], uniform: float) -> None:
        """Take `prior` from true ab, each (B, 2, h, w), and from it `weights`; mixed with `uniform` of all classes alike."""
        seen = torch.ones_like(self.prior)
        for ab in truths:
            cells = self.cells(ab)
            seen.index_add_(0, self.classes[cells].flatten(), self.shares[cells].flatten())
        self.prior = seen / seen.sum()
        weights = 1 / ((1 - uniform) * self.prior + uniform / len(seen))
        self.weights = weights / (self.prior * weights).sum()  # 1 in the mean over what is seen

    def forward(self, logits: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        """Weighted cross entropy of logits (B, Q, h, w), against true ab (B, 2, h, w)."""
        cells = self.cells(ab)
        classes = self.classes[cells]  # (B * h * w, NEAREST)
        likely = logits.permute(0, 2, 3, 1).flatten(0, 2).float().log_softmax(dim=1)  # (B * h * w, Q)
        said = (likely.gather(1, classes) * self.shares[cells]).sum(dim=1)
        return -(said * self.weights[classes[:, 0]]).mean()


def colourfulness(ab: torch.Tensor) -> torch.Tensor:
    """ab (B, 2, h, w) -> (B,), in the same units: how far colours are from their mean, and 0.37 of how far that is from gray.

    Hasler and Suesstrunk (2003), section 4, the form for CIELab, but with the mean distance instead of its root mean square,
    and without the margin: else the cheapest way to be as colourful as the truth is a bright line along one edge.
    """
    ab = ab[..., MARGIN : ab.shape[2] - MARGIN, MARGIN : ab.shape[3] - MARGIN]
    mean = ab.mean(dim=(2, 3), keepdim=True)
    spread = ((ab - mean).square().sum(1) + 1e-6).sqrt().mean(dim=(1, 2))  # the slope of a root is infinite at 0
    return spread + 0.37 * mean.flatten(1).norm(dim=1)


def first_truths(run: Run, stride: int) -> Iterator[torch.Tensor]:
    """The true ab (B, 2, h, w) of the first `--prior-pictures`, at the size of the logits."""
    args = run.args
    stream = PhotoStream(run.rows, args.image_size, args.seed) if args.streaming else None
    photos = stream or Photos(run.rows, args.image_size, augment=True, seed=args.seed)
    batches = loader(photos, args.batch_size, args.workers)
    for batch in itertools.islice(batches, math.ceil(args.prior_pictures / args.batch_size)):
        yield shrink(to_network(batch)[1], stride)


def shrink(ab: torch.Tensor, stride: int) -> torch.Tensor:
    """ab (B, 2, H, W) -> (B, 2, h, w), the size of the logits: means over stride x stride pixels, fewer at the edge."""
    return avg_pool2d(ab, stride, ceil_mode=True)


def main() -> None:
    args = parse(flags())
    run = Run(args)
    if args.start:
        model = load(args.start)
    else:
        known = args.dry_run and args.encoder == HOME  # a plan fetches nothing
        encoder = Encoder("lite2") if known else load_encoder(args.encoder)
        model = EfficientUNet(EfficientUNetConfig(encoder=encoder.name, width=args.width, stride=args.stride))
        model.encoder = encoder
    model.config = replace(model.config, temperature=args.temperature, image_size=args.image_size)
    stride = model.config.stride
    targets = Targets(model.colours)
    if not args.dry_run:
        targets.count(first_truths(run, stride), args.uniform)
        if not args.start and not args.resume:
            model.head.bias.data = (targets.prior * targets.weights).log()  # what it would say of no picture
    freeze(model.encoder, args.frozen_stages)
    perceptual = None
    if args.perceptual_weight and not args.dry_run:
        perceptual = Perceptual(args.encoder).to(run.accelerator.device, memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    targets = targets.to(run.accelerator.device)

    def loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch = varied(batch, args.mosaics) if args.mosaics else batch
        lightness, truth = to_network(batch)
        painted, logits = network(seen_as(batch, lightness, args.old_prints), classes=True)
        coarse, wanted = shrink(painted, stride), shrink(truth, stride)
        # All terms, whatever their weights: several processes would wait for gradients that one does without.
        total = args.class_weight * targets(logits, wanted) + args.l1_weight * l1_loss(painted, truth)
        total = total + args.colourfulness_weight * l1_loss(colourfulness(coarse), colourfulness(wanted))
        if perceptual:
            total = total + args.perceptual_weight * perceptual(lightness, painted, truth)
        return total

    groups = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "share": args.encoder_rate},
        {"params": [p for name, p in model.named_parameters() if not name.startswith("encoder.")]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)
    averaged = AveragedModel(model, multi_avg_fn=running_mean(args.ema), use_buffers=True).to(run.accelerator.device)
    facts = {"encoder": model.config.encoder.capitalize(), "temperature": model.config.temperature}
    summary = SUMMARY.format(classes=len(model.colours), **facts)
    words = {"name": "efficient-unet", "summary": summary, "failures": FAILURES}
    supervised.train(run, model, optimizer, loss, averaged=averaged, **words)


if __name__ == "__main__":
    main()
