"""Train a U-Net as the generator of a GAN, and keep a snapshot of it every epoch.

    accelerate launch train/gan.py --dataset PHOTOS --start runs/unet/checkpoint
    python train/gan.py --release runs/gan --epoch 3

It goes on from a generator that was trained for L1 (`train/unet.py`), whose muted colours the critic recognises: to fool it,
the generator has to dare some. A generator with a pretrained encoder (`train/efficient_unet.py`) keeps that as it is. The
defaults are the report's recipe: 30,974 steps, a snapshot after every 1000 of them. GANs swing and may collapse, so every
snapshot is kept for a person to choose from: `samples/` shows them, `checkpoint/` holds them, and `--release` makes one of
them the checkpoint.
"""

import argparse
import itertools
import logging
import math
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, mse_loss, relu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from colorize import hub
from colorize.models import Critic, CriticConfig
from data import seen_as, to_network
from pretrained import HOME, Perceptual, freeze
from run import Run, load, parse, parser

REAL, FAKE = 0.9, 0.1  # smoothed labels: a critic that is never quite sure keeps giving gradients
# The critic's loss when it knows everything, and when it knows nothing and calls all pictures half real.
ENTROPY = -(REAL * math.log(REAL) + FAKE * math.log(FAKE))
KNOWS = {"vanilla": (ENTROPY, math.log(2)), "lsgan": (0.0, (REAL - 0.5) ** 2), "hinge": (0.0, 1.0)}

SUMMARY = """A U-Net that paints the ab channels of a photograph from its lightness, first trained
on the truth alone, then against a multi-scale critic. `snapshots/` (on the Hub: tags) has the generator after every epoch."""

FAILURES = """Colours are more daring than with L1 alone, and so are the mistakes: patches of a wrong colour on large
even surfaces, colours that stop before the object does, warm casts indoors. What a photograph cannot tell (clothes, cars,
walls) is guessed. It was trained on small pictures, so fine detail takes the colour of what is around."""


def flags() -> argparse.ArgumentParser:
    f = parser(
        __doc__.splitlines()[0], run=Path("runs/gan"), batch_size=32, epochs=30.974, epoch_steps=1000, validation_pictures=24
    )
    f.add_argument("--start", help="the checkpoint to start from: a folder or a Hub id")
    f.add_argument("--loss", choices=sorted(KNOWS), default="vanilla", help="of the critic's verdicts")
    f.add_argument("--learning-rate", type=float, default=2e-4, help="of the generator and of the critic")
    f.add_argument("--l1-weight", type=float, default=100.0, help="of the distance to the truth against the critic's verdict")
    f.add_argument("--perceptual-weight", type=float, default=0.0, help="of how different it looks to ImageNet's network")
    f.add_argument("--encoder", default=HOME, help="that network's weights: a .safetensors file or a Hub id")
    f.add_argument("--old-prints", type=float, default=0.0, help="share of the pictures that are shown as old, faded prints")
    f.add_argument(
        "--ema", type=float, default=0.0, help="keep a running mean of the weights with this decay, 0.999 say; 0: none"
    )
    f.add_argument("--critic-filters", type=int, default=64)
    f.add_argument("--critic-layers", type=int, default=5)
    f.add_argument("--release", metavar="RUN", type=Path, help="make the snapshot of --epoch the checkpoint of a run, and stop")
    f.add_argument("--epoch", type=int)
    return f


def verdict_loss(logits: list[torch.Tensor], real: bool, loss: str, critic: bool = True) -> torch.Tensor:
    """How far the critic's logits are from `real`, averaged over its scales; for the hinge loss, as the `critic` minds it."""
    if loss == "hinge":
        sign = 1 if real else -1
        each = [relu(1 - sign * x).mean() if critic else (-sign * x).mean() for x in logits]
    else:
        distance = binary_cross_entropy_with_logits if loss == "vanilla" else mse_loss
        each = [distance(x, torch.full_like(x, REAL if real else FAKE)) for x in logits]
    return torch.stack(each).mean()


def collapse(critic_loss: float, spread: float, loss: str) -> str | None:
    """What went wrong, if it did. `spread` is the deviation of the painted ab as a share of the truth's."""
    floor, ignorance = KNOWS[loss]
    if critic_loss - floor < 0.05 * (ignorance - floor):
        return f"the critic sees through everything (loss {critic_loss:.4f}, and {floor:.4f} is the least): no use going on"
    if spread < 0.05:
        return f"the generator paints everything the same (its ab vary {spread:.1%} as much as the truth's): no use going on"
    return None


def main() -> None:
    f = flags()
    args = f.parse_args()
    if args.release:
        return release(args.release, args.epoch)
    args = parse(f)
    if not args.start:
        f.error("--start is missing: a checkpoint of train/unet.py, say, to start from, a folder or a Hub id")
    generator = load(args.start).to(memory_format=torch.channels_last)
    if generator.paints != "ab":
        raise SystemExit(f"{args.start} paints RGB, and the critic looks at ab: start from a U-Net")
    run = Run(args)
    accelerator = run.accelerator
    critic = Critic(CriticConfig(args.critic_filters, args.critic_layers))
    if args.dry_run:
        return run.plan(generator=generator, critic=critic)
    perceptual = Perceptual(args.encoder).to(accelerator.device) if args.perceptual_weight else None
    if hasattr(generator, "encoder"):  # it knows the world: what is to change is how boldly the decoder paints it
        freeze(generator.encoder, len(generator.encoder.blocks))
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True).to(accelerator.device)
    adam = {"lr": args.learning_rate, "betas": (0.5, 0.999)}
    batches, trained_generator, trained_critic, optimizer, critic_optimizer = run.begin(
        generator,
        critic,
        torch.optim.Adam([p for p in generator.parameters() if p.requires_grad], **adam),
        torch.optim.Adam(critic.parameters(), **adam),
        keep=(averaged,),
    )
    paint, judge, trained_judge = map(run.compiled, (trained_generator, critic, trained_critic))
    history, watched, warned = run.memory.get("history", []), None, None

    for step in run:
        for batch in itertools.islice(batches, args.accumulate):
            with accelerator.accumulate(trained_generator, trained_critic):
                lightness, ab = to_network(batch)

                # The generator: close to the truth, and taken for it. The critic only looks on, so not in its distributed wrap.
                critic.requires_grad_(False)
                with accelerator.autocast():
                    painted = paint(seen_as(batch, lightness, args.old_prints))
                    verdict = [scale[-1].float() for scale in judge(lightness, painted)]
                distance, fooled = l1_loss(painted.float(), ab), verdict_loss(verdict, True, args.loss, critic=False)
                total = fooled + args.l1_weight * distance
                if perceptual:
                    total = total + args.perceptual_weight * perceptual(lightness, painted.float(), ab)
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(generator.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

                # The critic: tell the two apart.
                critic.requires_grad_(True)
                with accelerator.autocast():
                    both = torch.cat((ab, painted.detach().float()))  # (2 * B, 2, H, W)
                    verdict = [scale[-1].float().chunk(2) for scale in trained_judge(torch.cat((lightness, lightness)), both)]
                real, fake = zip(*verdict, strict=True)
                caught = (verdict_loss(real, True, args.loss) + verdict_loss(fake, False, args.loss)) / 2
                accelerator.backward(caught)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(critic.parameters(), 1.0)
                critic_optimizer.step()
                critic_optimizer.zero_grad()
        averaged.update_parameters(generator)  # the swings cancel out; with decay 0 a mere copy

        spread = painted.float().std() / ab.std()
        figures = run.log(step, l1=distance, generator=fooled, critic=caught, spread=spread, learning_rate=args.learning_rate)
        if figures:
            recent = torch.tensor([figures["critic"], figures["spread"]])
            watched = recent if watched is None else watched.lerp(recent, 0.1)
            if (problem := collapse(*watched.tolist(), args.loss)) and not warned:
                run.say(f"step {step}: {problem}; take an earlier epoch, or a lower learning rate", logging.WARNING)
            warned = problem

        if step % run.epoch_steps == 0 or step == run.steps:
            epoch = f"epoch-{math.ceil(step / run.epoch_steps):03d}"
            figures = run.validate(step, averaged.module, epoch)
            history = run.memory["history"] = [*history, [epoch, figures]]
            attention = "-attention" if getattr(generator.config, "attention", False) else ""
            name = f"{generator.config.architecture}{attention}-gan"
            words = {"name": name, "summary": SUMMARY, "failures": FAILURES, "table": epoch_table(history)}
            run.export(averaged.module, figures, snapshot=epoch, **words)
    run.end()


def epoch_table(history: list[tuple[str, dict]]) -> str:
    head = "| epoch | L1 of ab | PSNR, dB | colourfulness, share of the truth's |\n|---|---|---|---|"
    rows = [f"| {epoch} | {f['l1']:.4f} | {f['psnr']:.2f} | {f['colourfulness_ratio']:.2f} |" for epoch, f in history]
    return "\n".join(["### Epoch by epoch\n", head, *rows])


def release(run: Path, epoch: int | None) -> None:
    """Make a snapshot the checkpoint: its weights, and the card that was written with them."""
    checkpoint = run / "checkpoint"
    epochs = hub.snapshots(checkpoint)
    if epoch is None or f"epoch-{epoch:03d}" not in epochs:
        raise SystemExit(f"--release {run} wants --epoch, one of {', '.join(epochs) or 'none'}")
    chosen = checkpoint / "snapshots" / f"epoch-{epoch:03d}"
    hub.save(hub.load(chosen), checkpoint, (chosen / hub.CARD).read_text())
    print(f"{checkpoint} is {chosen.name} now")


if __name__ == "__main__":
    main()
