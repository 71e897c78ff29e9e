"""Train a U-Net as the generator of a GAN, and keep a snapshot of it every epoch.

    accelerate launch train/gan.py --dataset PHOTOS --start runs/unet/checkpoint

It goes on from a generator that was trained for L1 (`train/unet.py`), whose muted colours the critic recognises: to fool
it, the generator has to dare some. The defaults are the report's recipe: 30,974 steps, here in 31 epochs of 1000. GANs swing
and may collapse, so every snapshot is kept for a person to choose from: `samples/` shows them, `checkpoint/` holds them.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from card import model_card
from colorize import hub
from colorize.models import Critic, CriticConfig
from data import to_network
from run import command, num_parameters, parser, spent, start, take
from validation import validate, write_png

REAL, FAKE = 0.9, 0.1  # smoothed labels: a critic that is never quite sure keeps giving gradients

SUMMARY = """A U-Net that paints the ab channels of a photograph from its lightness, first trained
for L1, then against a multi-scale critic. `snapshots/` holds the generator after every epoch."""

FAILURES = """Colours are more daring than with L1 alone, and so are the mistakes: patches of a wrong colour on large
even surfaces, colours that stop before the object does, warm casts indoors. What a photograph cannot tell (clothes, cars,
walls) is guessed. It was trained on small pictures, so fine detail takes the colour of what is around."""


def flags() -> argparse.ArgumentParser:
    f = parser(
        __doc__.splitlines()[0], run=Path("runs/gan"), batch_size=32, epochs=31, epoch_steps=1000, validation_pictures=24
    )
    f.add_argument("--start", required=True, help="the checkpoint to start from: a folder or a Hub id")
    f.add_argument("--learning-rate", type=float, default=2e-4, help="of the generator and of the critic")
    f.add_argument("--l1-weight", type=float, default=100.0, help="of the distance to the truth against the critic's verdict")
    f.add_argument(
        "--ema", type=float, default=0.0, help="keep a running mean of the weights with this decay, 0.999 say; 0: none"
    )
    f.add_argument("--critic-filters", type=int, default=64)
    f.add_argument("--critic-layers", type=int, default=5)
    return f


def verdict_loss(maps: list[list[torch.Tensor]], label: float) -> torch.Tensor:
    """How far the critic's logits are from `label`, averaged over its scales."""
    losses = [binary_cross_entropy_with_logits(m[-1].float(), torch.full_like(m[-1], label).float()) for m in maps]
    return torch.stack(losses).mean()


def main() -> None:
    args = flags().parse_args()
    generator = hub.load(args.start).requires_grad_(True).train().to(memory_format=torch.channels_last)
    if generator.paints != "ab":
        raise SystemExit(f"{args.start} paints RGB, and the critic looks at ab: start from a U-Net")
    accelerator, batches, held_out = start(args)
    critic = Critic(CriticConfig(args.critic_filters, args.critic_layers))
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True).to(accelerator.device)
    adam = {"lr": args.learning_rate, "betas": (0.5, 0.999)}
    optimizer, critic_optimizer = (
        torch.optim.Adam(generator.parameters(), **adam),
        torch.optim.Adam(critic.parameters(), **adam),
    )
    generator, critic, optimizer, critic_optimizer, batches, held_out = accelerator.prepare(
        generator, critic, optimizer, critic_optimizer, batches, held_out
    )

    began = time.monotonic()
    checkpoint, history = args.run / "checkpoint", []
    epoch_steps = args.epoch_steps or len(batches)
    steps = args.epochs * epoch_steps
    bar = tqdm(take(batches, steps), total=steps, unit="step", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar, start=1):
        lightness, ab = to_network(batch)

        # The generator: close to the truth, and taken for it.
        critic.requires_grad_(False)
        with accelerator.autocast():
            painted = generator(lightness)
            verdict = critic(lightness, painted)
        distance, fooled = l1_loss(painted.float(), ab), verdict_loss(verdict, REAL)
        accelerator.backward(fooled + args.l1_weight * distance)
        accelerator.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(accelerator.unwrap_model(generator))  # the swings cancel out; with decay 0 a mere copy

        # The critic: tell the two apart.
        critic.requires_grad_(True)
        with accelerator.autocast():
            real, fake = critic(lightness, ab), critic(lightness, painted.detach())
        caught = (verdict_loss(real, REAL) + verdict_loss(fake, FAKE)) / 2
        accelerator.backward(caught)
        accelerator.clip_grad_norm_(critic.parameters(), 1.0)
        critic_optimizer.step()
        critic_optimizer.zero_grad()

        if step == 1 or step % 20 == 0:
            losses = {"l1": distance.item(), "generator": fooled.item(), "critic": caught.item()}
            bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()})
            accelerator.log({f"train/{k}": v for k, v in losses.items()}, step)

        if step % epoch_steps == 0:
            epoch = f"epoch-{step // epoch_steps:03d}"
            figures, sheet = validate(accelerator, averaged.module, held_out)
            accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step)
            if not all(math.isfinite(v) for v in figures.values()):
                raise SystemExit(
                    f"{epoch}: the generator gives no numbers any more; the snapshots before it are in {checkpoint}"
                )
            if accelerator.is_main_process:
                history.append((epoch, figures))
                bar.write(f"{epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                write_png(args.run / "samples" / f"{epoch}.png", sheet)
                card = model_card(
                    "unet-attention-gan" if averaged.module.config.attention else "unet-gan",
                    args,
                    figures,
                    summary=SUMMARY,
                    failures=FAILURES,
                    command=command(),
                    spent=spent(accelerator, began),
                    parameters=num_parameters(generator),
                )
                card = card.replace("## Where it fails", f"{epoch_table(history)}\n\n## Where it fails")
                hub.save(averaged.module, checkpoint / "snapshots" / epoch)
                hub.save(averaged.module, checkpoint, card)
    accelerator.end_training()


def epoch_table(history: list[tuple[str, dict]]) -> str:
    head = "| epoch | L1 of ab | PSNR, dB | colourfulness, share of the truth's |\n|---|---|---|---|"
    rows = [f"| {epoch} | {f['l1']:.4f} | {f['psnr']:.2f} | {f['colourfulness_ratio']:.2f} |" for epoch, f in history]
    return "\n".join(["### Epoch by epoch\n", head, *rows])


if __name__ == "__main__":
    main()
