"""Train the plain ConvNet, which paints RGB from gray.

    accelerate launch train/convnet.py --dataset PHOTOS   # model 1 of the report

The defaults are the report's recipe: Huber loss, Adam, batches of 10, one pass over the data.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import huber_loss

import supervised
from colorize.color import LIGHTNESS_SCALE, lightness_to_gray
from colorize.models import ConvNet, ConvNetConfig
from data import to_network
from run import Run, load, parse, parser

SUMMARY = "A plain convolutional network that paints RGB from gray, trained with a Huber loss."

FAILURES = """The network sees a small neighbourhood of each pixel only, and answers with the mean of all plausible colours:
results are muted, brownish, and blurred where colours meet. Of the RGB that it paints, only hue and chroma are used."""


def flags() -> argparse.ArgumentParser:
    f = parser(__doc__.splitlines()[0], run=Path("runs/convnet"), batch_size=10, epochs=1.0, validation_pictures=1024)
    f.add_argument("--width", type=int, default=32, help="channels after the first convolution")
    return supervised.flags(f)


def huber(model, batch: torch.Tensor) -> torch.Tensor:
    """Of RGB in [0, 1]. The gray that the network sees is that of the app: the picture's L*, as sRGB."""
    lightness, _ = to_network(batch)
    painted = model(lightness_to_gray((lightness + 1) * LIGHTNESS_SCALE))
    return huber_loss(painted.float(), batch.permute(0, 3, 1, 2) / 255)


def main() -> None:
    args = parse(flags())
    run = Run(args)
    config = ConvNetConfig(width=args.width, image_size=args.image_size)
    model = load(args.start) if args.start else ConvNet(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    supervised.train(run, model, optimizer, huber, name="convnet", summary=SUMMARY, failures=FAILURES)


if __name__ == "__main__":
    main()
