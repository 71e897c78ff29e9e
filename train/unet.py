"""Train a U-Net, with or without criss-cross attention, to minimise the L1 distance in ab.

    accelerate launch train/unet.py --dataset PHOTOS                  # model 3 of the report
    accelerate launch train/unet.py --dataset PHOTOS --no-attention   # model 2

The defaults are the report's recipe. PHOTOS needs the splits `train` and `validation`, as `datasets` understands them.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn.functional import l1_loss
from tqdm import tqdm

from card import model_card
from colorize import hub
from colorize.models import UNet, UNetConfig
from data import to_network
from run import command, num_parameters, parser, spent, start, take
from validation import validate, write_png

SUMMARY = "A U-Net that paints the ab channels of a photograph from its lightness, trained with an L1 loss."

FAILURES = """Minimising L1 means predicting the colour in the middle of all that are plausible: results are muted, "a
sepia filter", wherever the lightness does not tell the colour (clothes, cars, walls). Skies and foliage come out best.
Small objects take the colour of what is around."""


def flags() -> argparse.ArgumentParser:
    f = parser(__doc__.splitlines()[0], run=Path("runs/unet"), batch_size=64, epochs=4, validation_pictures=1024)
    f.add_argument("--attention", action=argparse.BooleanOptionalAction, default=True)
    f.add_argument("--num-filters", type=int, default=64)
    f.add_argument("--num-downs", type=int, default=8)
    f.add_argument(
        "--learning-rate", type=float, default=7e-4, help="at the end of the warm-up; a tenth of it before and at the end"
    )
    f.add_argument("--warmup-steps", type=int, default=1000)
    f.add_argument("--weight-decay", type=float, default=1e-5)
    f.add_argument("--validate-every", type=int, default=1000, help="steps")
    f.add_argument("--patience", type=int, default=5, help="stop after so many validations without gain")
    return f


def rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate: linear from 0.1 to 1, then a cosine back to 0.1."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * min(done, 1))


def main() -> None:
    args = flags().parse_args()
    accelerator, batches, held_out = start(args)
    config = UNetConfig(
        num_filters=args.num_filters, num_downs=args.num_downs, attention=args.attention, image_size=args.image_size
    )
    model = UNet(config).to(memory_format=torch.channels_last)  # faster convolutions on GPUs and on CPUs in bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer, batches, held_out = accelerator.prepare(model, optimizer, batches, held_out)

    began = time.monotonic()
    steps = args.epochs * (args.epoch_steps or len(batches))
    best, misses = math.inf, 0
    name, attention = ("unet-attention", "criss-cross attention") if args.attention else ("unet", "no attention")
    bar = tqdm(take(batches, steps), total=steps, unit="step", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar, start=1):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate(step - 1, args.warmup_steps, steps)
        lightness, ab = to_network(batch)
        with accelerator.autocast():
            painted = model(lightness)
        loss = l1_loss(painted.float(), ab)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            bar.set_postfix(l1=f"{loss.item():.4f}", lr=f"{group['lr']:.1e}", best=f"{best:.4f}")
            accelerator.log({"train/l1": loss.item(), "learning_rate": group["lr"]}, step)

        if step % args.validate_every == 0 or step == steps:
            figures, sheet = validate(accelerator, model, held_out)
            accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step)
            misses = 0 if figures["l1"] < best else misses + 1
            if accelerator.is_main_process:
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                write_png(args.run / "samples" / f"step-{step:06d}.png", sheet)
                if not misses:
                    card = model_card(
                        name,
                        args,
                        figures,
                        summary=f"{SUMMARY} It has {attention}.",
                        failures=FAILURES,
                        command=command(),
                        spent=spent(accelerator, began),
                        parameters=num_parameters(model),
                    )
                    hub.save(accelerator.unwrap_model(model), args.run / "checkpoint", card)
            best = min(best, figures["l1"])
            if misses >= args.patience:
                break

    accelerator.end_training()


if __name__ == "__main__":
    main()
