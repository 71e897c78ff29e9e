"""Train a U-Net, with or without criss-cross attention, to minimise the L1 distance in ab.

    accelerate launch train/unet.py --dataset PHOTOS                  # model 3 of the report
    accelerate launch train/unet.py --dataset PHOTOS --no-attention   # model 2

The defaults are the report's recipe: L1 loss, AdamW, batches of 64; model 3 in four epochs, each with half the learning rate of
the one before, model 2 in one. To fine-tune, `--start CHECKPOINT --learning-rate 3.5e-4`.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import l1_loss

import supervised
from colorize.models import UNet, UNetConfig
from data import to_network
from run import Run, load, parse, parser

SUMMARY = "A U-Net that paints the ab channels of a photograph from its lightness, trained with an L1 loss. It has {attention}."

FAILURES = """Minimising L1 means predicting the colour in the middle of all that are plausible: results are muted, "a
sepia filter", wherever the lightness does not tell the colour (clothes, cars, walls). Skies and foliage come out best.
Small objects take the colour of what is around."""


def flags() -> argparse.ArgumentParser:
    f = parser(__doc__.splitlines()[0], run=Path("runs/unet"), batch_size=64, validation_pictures=1024)
    f.add_argument("--attention", action=argparse.BooleanOptionalAction, default=True)
    f.add_argument("--num-filters", type=int, default=64)
    f.add_argument("--num-downs", type=int, default=8)
    supervised.flags(f).set_defaults(patience=5)
    return f


def l1(model, batch: torch.Tensor) -> torch.Tensor:
    """Of ab in [-1, 1]."""
    lightness, ab = to_network(batch)
    return l1_loss(model(lightness).float(), ab)


def main() -> None:
    args = parse(flags())
    if args.epochs is None:
        args.epochs = 4.0 if args.attention else 1.0
    run = Run(args)
    config = UNetConfig(
        num_filters=args.num_filters, num_downs=args.num_downs, attention=args.attention, image_size=args.image_size
    )
    model = load(args.start) if args.start else UNet(config)
    model = model.to(memory_format=torch.channels_last)  # faster convolutions on GPUs, and on CPUs in bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    name, attention = ("unet-attention", "criss-cross attention") if model.config.attention else ("unet", "no attention")
    supervised.train(run, model, optimizer, l1, name=name, summary=SUMMARY.format(attention=attention), failures=FAILURES)


if __name__ == "__main__":
    main()
