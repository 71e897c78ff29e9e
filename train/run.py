"""What every training program starts with: its flags, its run folder, its data. And what it ends with: a checkpoint.

A run lives in one folder, `runs/NAME` by default: `settings.json`, `logs/` for TensorBoard, `samples/` to look at, and
`checkpoint/`, which is ready for `checkpoints/` or the Hub at any moment.
"""

import argparse
import importlib.util
import itertools
import json
import logging
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import Subset

from colorize.atomic import atomic
from data import Photos, loader, open_dataset


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all programs share. `defaults` are the program's recipe."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--dataset", required=True, help="a folder of pictures, a `datasets` folder or a Hub id")
    flags.add_argument("--run", type=Path, help="folder of this run")
    flags.add_argument("--image-size", type=int, default=512, help="side of the square crops, pixels")
    flags.add_argument("--batch-size", type=int, help="pictures a step and process")
    flags.add_argument("--epochs", type=int)
    flags.add_argument("--epoch-steps", type=int, help="steps that count as one epoch (without it: one pass over the data)")
    flags.add_argument("--validation-pictures", type=int)
    flags.add_argument("--workers", type=int, default=2, help="processes that decode pictures; 0 decodes in the main one")
    flags.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--data-note", help="a sentence on the data and their licences, for the model card")
    flags.set_defaults(**defaults)
    return flags


def start(args: argparse.Namespace):
    """-> (accelerator, loader of the training split, loader of the validation split), not yet prepared."""
    args.run.mkdir(parents=True, exist_ok=True)
    tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else None
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=tracker, project_dir=args.run)
    set_seed(args.seed)
    if accelerator.is_main_process:
        logging.basicConfig(level=logging.INFO, format="%(message)s", filename=args.run / "train.log")
        with atomic(args.run / "settings.json") as path:
            path.write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    accelerator.init_trackers("logs", config=settings)

    rows, held_out = open_dataset(args.dataset)
    if len(rows) < args.batch_size:
        raise SystemExit(
            f"{args.dataset}: {len(rows)} pictures are less than one batch of {args.batch_size}; lower --batch-size"
        )
    held_out = Subset(held_out, range(min(args.validation_pictures, len(held_out))))
    photos, held_out = Photos(rows, args.image_size, augment=True), Photos(held_out, args.image_size, augment=False)
    return accelerator, loader(photos, args.batch_size, args.workers), loader(held_out, args.batch_size, 0)


def take(batches, steps: int):
    """So many batches, through the data as often as that takes."""
    epochs = (batch for _ in itertools.count() for batch in batches)
    return itertools.islice(epochs, steps)


def command() -> str:
    """The command that started this program, for the model card."""
    words = [f"train/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--data-note" in words:  # has a section of its own
        at = words.index("--data-note")
        del words[at : at + 2]
    return shlex.join(["accelerate", "launch", *words])


def spent(accelerator: Accelerator, began: float) -> str:
    """Time and hardware since `began` (of `time.monotonic`), for the model card."""
    return f"{(time.monotonic() - began) / 60:.0f} minutes on {accelerator.num_processes} x {accelerator.device.type}"


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
