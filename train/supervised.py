"""The loop of the programs that learn from the truth alone: `convnet.py`, `unet.py` and `efficient_unet.py`."""

import argparse
import itertools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from run import Run


def flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what these programs share beyond the flags of all."""
    parser.add_argument("--start", help="go on from a checkpoint (a folder or a Hub id) instead of random weights")
    parser.add_argument("--learning-rate", type=float, default=7e-4, help="after the warm-up; a tenth before and at the end")
    parser.add_argument("--warmup-steps", type=int, default=1000)
    parser.add_argument("--decay", type=float, default=0.5, help="what is left of the learning rate in each next epoch")
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--validate-every", type=int, default=1000, help="steps")
    parser.add_argument("--patience", type=int, help="stop after so many validations without gain (without it: never)")
    return parser


def rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step from 0: linear from 0.1 to 1, then a cosine back to 0.1."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * min(done, 1))


def train(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable,
    averaged: AveragedModel | None = None,
    **words: str,
) -> None:
    """Train `model` by `loss_of(model, batch)`, and export it whenever it gets closer to the truth on the validation pictures.

    `batch` is (B, H, W, 3) uint8 RGB; `words` are for the model card. A parameter group of the optimizer may have a `share` of
    the learning rate. With `averaged`, that mean of the weights is what is validated, and it is exported whatever its L1.
    """
    args, accelerator = run.args, run.accelerator
    if args.dry_run:
        return run.plan(model=model)
    batches, prepared, optimizer = run.begin(model, optimizer, keep=(averaged,) if averaged else ())
    network = run.compiled(prepared)
    result = averaged.module if averaged else model
    best, misses = run.memory.get("best", math.inf), run.memory.get("misses", 0)

    for step in run:
        epoch, done = divmod(step - 1, run.epoch_steps)
        learning_rate = args.learning_rate * args.decay**epoch * rate(done, args.warmup_steps, run.epoch_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("share", 1.0)

        losses = []
        for batch in itertools.islice(batches, args.accumulate):
            with accelerator.accumulate(prepared):
                with accelerator.autocast():
                    loss = loss_of(network, batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        if averaged:
            averaged.update_parameters(model)
        run.log(step, **{loss_of.__name__: torch.stack(losses).mean(), "learning_rate": learning_rate})

        if step % args.validate_every == 0 or step == run.steps:
            figures = run.validate(step, result, f"step-{step:06d}")
            misses = 0 if figures["l1"] < best else misses + 1
            best = min(best, figures["l1"])
            run.memory = {"best": best, "misses": misses}
            if averaged or not misses:
                run.export(result, figures, **words)
            if args.patience and misses >= args.patience:
                run.say(f"stopped early: {misses} validations without gain")
                break
    run.end()
