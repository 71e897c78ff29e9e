"""What every training program shares: its flags, and its run folder, in which it can go on after any stop.

runs/NAME/
    settings.json   every flag as it was resolved
    figures.jsonl   losses and validation figures, a line each; logs/ has the same for TensorBoard
    curves.png      drawn from it
    damaged.txt     pictures that were skipped
    samples/        the validation pictures, to look at: gray, output, truth
    state/STEP/     what `--resume` goes on from
    checkpoint/     ready for `checkpoints/` or the Hub at any moment
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast, gather_object, set_seed
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from card import model_card
from colorize import hub
from colorize.atomic import atomic
from colorize.memory import keep_memory
from data import Photos, PhotoStream, loader, open_dataset
from validation import validate, write_png

log = logging.getLogger(__name__)

LOG_EVERY = 10  # steps
AGREE_EVERY = 10  # steps after which several processes ask each other whether to stop


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all programs share. `defaults` are the program's recipe."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--dataset", help="a folder or a .txt list of pictures, a `datasets` folder or a Hub id")
    flags.add_argument("--streaming", action="store_true", help="read a data set of parquet files as it comes, without a copy")
    flags.add_argument("--run", type=Path, help="folder of this run")
    flags.add_argument("--resume", metavar="RUN", type=Path, help="go on with a run, set as it was, from its last state")
    flags.add_argument("--dry-run", action="store_true", help="print settings, parameters and steps, and stop")
    flags.add_argument("--image-size", type=int, default=512, help="side of the square crops, pixels")
    flags.add_argument("--batch-size", type=int, help="pictures that a process sees at once")
    flags.add_argument("--accumulate", type=int, default=1, help="batches a step")
    flags.add_argument("--epochs", type=float, help="fractions count too")
    flags.add_argument("--epoch-steps", type=int, help="steps that count as one epoch (without it: one pass over the data)")
    flags.add_argument("--validation-pictures", type=int)
    flags.add_argument("--save-every", type=int, default=500, help="steps after which the state for --resume is saved")
    flags.add_argument("--workers", type=int, default=2, help="processes that decode pictures; 0 decodes in the main one")
    flags.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    flags.add_argument("--compile", action="store_true", help="torch.compile the networks")
    trackers = sorted({tracker.value for tracker in LoggerType} - {"all"})
    flags.add_argument("--trackers", nargs="*", choices=trackers, default=["tensorboard"], metavar="NAME", help=str(trackers))
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--push-to-hub", metavar="USER/NAME", help="publish the checkpoint at the end")
    flags.add_argument("--data-note", help="a sentence on the data and their licences, for the model card")
    flags.set_defaults(**defaults)
    return flags


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of this start; with `--resume`, those of the run that goes on, and what is given beside it."""
    args = flags.parse_args()
    if args.resume:
        settings = args.resume / "settings.json"
        if not settings.is_file() or not newest_state(args.resume):
            raise SystemExit(f"{args.resume} holds no run to go on with: it wants settings.json and a folder in state/")
        flags.set_defaults(**json.loads(settings.read_text()))
        args = flags.parse_args()
        args.run = args.resume
    elif not args.dry_run and newest_state(args.run):
        raise SystemExit(f"{args.run} holds a run already: go on with it (--resume {args.run}), or name another folder (--run)")
    else:
        args.command = command()
    if not args.dataset:
        flags.error("--dataset is missing: a folder or a .txt list of pictures, a `datasets` folder or a Hub id")
    return args


def load(checkpoint: str) -> nn.Module:
    """A network to train on from."""
    try:
        return hub.load(checkpoint).requires_grad_(True).train()
    except hub.CheckpointError as error:
        raise SystemExit(str(error)) from error


def newest_state(folder: Path) -> Path | None:
    """The last state of a run that is whole: a state gets its name, which is its step, when all of it is on the disk."""
    return max((p for p in folder.glob("state/*") if p.name.isdigit()), key=lambda p: int(p.name), default=None)


class Run:
    """A run's folder and accelerator, and how far it has come.

    `step` is the last one done, `memory` what a program wants to know again after `--resume`.
    """

    def __init__(self, args: argparse.Namespace):
        keep_memory()
        self.args, self.folder = args, args.run
        self.resumed = newest_state(args.run) if args.resume else None
        self.step = int(self.resumed.name) if self.resumed else 0
        self.memory, self.seconds = {}, 0.0
        self.rows, self.held_out = open_dataset(args.dataset, args.streaming, args.validation_pictures)
        trackers = [] if args.dry_run else [name for name in args.trackers if _installed(name)]
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.accumulate,
            log_with=trackers or None,
            project_config=ProjectConfiguration(args.run, logging_dir=args.run / "logs"),
            # The critic's spectral norms come out alike on every process, and batch statistics are shared before they are used.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            # `accelerate launch` gives a process one thread of the CPU unless it is told; let them share all.
            torch.set_num_threads(max((os.cpu_count() or 1) // self.accelerator.num_processes, 1))
        set_seed(args.seed)
        if self.resumed and (processes := len(list(self.resumed.glob("random_states_*")))) != self.accelerator.num_processes:
            raise SystemExit(f"{self.resumed} was saved by {processes} processes: go on with as many")
        batch = args.batch_size * args.accumulate * self.accelerator.num_processes
        if not args.epoch_steps and args.streaming:
            raise SystemExit("--streaming does not know how long a pass is: add --epoch-steps")
        self.pictures_a_step, self.epoch_steps = batch, args.epoch_steps or max(len(self.rows) // batch, 1)
        self.steps = round(args.epochs * self.epoch_steps)

    def plan(self, **networks: nn.Module) -> None:
        """Print what this run would do. That is all that `--dry-run` does."""
        print(json.dumps(vars(self.args), indent=2, default=str))
        for name, network in networks.items():
            print(f"{name}: {num_parameters(network):,} parameters")
        pictures = "a stream of pictures" if self.args.streaming else f"{len(self.rows):,} pictures"
        epochs = f"{self.args.epochs:g} epochs of {self.epoch_steps:,}"
        print(f"{pictures}, {self.pictures_a_step} a step; {self.steps:,} steps: {epochs}")

    def begin(self, model: nn.Module, *others, keep: tuple = ()) -> list:
        """Open the folder, prepare data, networks and optimizers, and take up the saved state, if there is one.

        `keep` has what else has a state. -> the endless batches (B, H, W, 3) uint8 RGB, then `model` and `others` as prepared.
        """
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("state/*.part"):
                shutil.rmtree(part)
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=self.folder / "train.log")
            settings = {k: v for k, v in vars(args).items() if k not in ("resume", "dry_run", "run")}
            with atomic(self.folder / "settings.json") as path:
                path.write_text(json.dumps(settings, indent=2, default=str) + "\n")
            with open(self.folder / "figures.jsonl", "a+b") as file:  # after a kill its last line may be torn
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 1, 0))
                if size and file.read() != b"\n":
                    file.write(b"\n")
        accelerator.wait_for_everyone()
        scalars = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
        special = {
            "tensorboard": {"purge_step": self.step + 1},  # what came after the saved state did not happen
            "trackio": {"name": self.folder.name},
            "wandb": {"name": self.folder.name, "dir": str(self.folder)},
        }
        accelerator.init_trackers("colorize", config=scalars, init_kwargs=special)

        damaged = self.folder / "damaged.txt"
        rank, world = accelerator.process_index, accelerator.num_processes
        first = self.step * args.accumulate  # batch of this process
        if args.streaming:  # every process reads a part of its own: there is nothing for Accelerate to deal out
            photos = PhotoStream(self.rows, args.image_size, args.seed, first * args.batch_size, rank, world, damaged)
            batches = loader(photos, args.batch_size, args.workers)
        else:
            photos = Photos(self.rows, args.image_size, augment=True, seed=args.seed, damaged=damaged)
            batches = accelerator.prepare(loader(photos, args.batch_size, args.workers, first * world))
        held_out = [self.held_out[i] for i in range(min(args.validation_pictures, len(self.held_out)))]
        held_out = Photos(held_out, args.image_size, damaged=damaged)
        self.validation_batches = accelerator.prepare(loader(held_out, args.batch_size, 0))

        prepared = accelerator.prepare(model, *others)
        self.watched = [x for x in (model, *others) if isinstance(x, nn.Module)]
        accelerator.register_for_checkpointing(self, *keep)
        if self.resumed:
            accelerator.load_state(str(self.resumed))
        return [(batch.to(accelerator.device) for batch in batches), *(prepared if others else [prepared])]

    def compiled(self, network: nn.Module):
        """What the loop calls. The network itself is what is saved: a compiled one has other keys."""
        return torch.compile(network) if self.args.compile else network

    def __iter__(self) -> Iterator[int]:
        """The steps that are left, 1 the first of all: with a bar, the state saved as it goes, and a clean end on Ctrl-C."""
        stop = Stop(self.accelerator)
        self.bar = tqdm(
            total=self.steps * self.pictures_a_step, initial=self.step * self.pictures_a_step, unit=" pictures",
            disable=not self.accelerator.is_main_process, smoothing=0.05,
        )  # fmt: skip
        self.clock = time.monotonic()
        with stop, self.bar:
            while self.step < self.steps:
                yield self.step + 1
                self.step += 1
                self.bar.update(self.pictures_a_step)
                stopped = stop.asked(self.step)
                if stopped or self.step % self.args.save_every == 0 or self.step == self.steps:
                    self.save()
                if stopped:
                    self.say(f"stopped after step {self.step}; --resume {self.folder} goes on from there")
                    self.accelerator.end_training()
                    raise SystemExit(0)

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Above the bar and in train.log."""
        if self.accelerator.is_main_process:
            self.bar.write(message, file=sys.stderr)
            log.log(level, message)

    def log(self, step: int, **figures: float | torch.Tensor) -> dict[str, float] | None:
        """Every `LOG_EVERY` steps: losses (means over the processes) and the like, to the bar, the trackers and figures.jsonl.

        Raises:
            SystemExit: one is not a number.
        """
        if step % LOG_EVERY and step != 1:
            return None
        tensors = {k: v.detach() for k, v in figures.items() if isinstance(v, torch.Tensor)}
        figures |= {k: self.accelerator.reduce(v, "mean").item() for k, v in tensors.items()}
        self.check(step, figures)
        self.bar.set_postfix({"step": step, **{k: f"{v:.3g}" for k, v in figures.items()}})
        rate = self.bar.format_dict["rate"]
        speed = {"images_per_second": rate} if rate else {}
        self.record(step, **{k if k == "learning_rate" else f"train/{k}": v for k, v in figures.items()}, **speed)
        return figures

    def check(self, step: int, figures: dict[str, float]) -> None:
        """Raises SystemExit if one is not a number: the training has diverged, and nothing is saved any more."""
        if wrong := [k for k, v in figures.items() if not math.isfinite(v)]:
            state = newest_state(self.folder)
            remedy = f"go on with it from {state} (--resume {self.folder} --learning-rate ...)" if state else "start again"
            raise SystemExit(f"step {step}: {wrong[0]} is no number any more. Lower the learning rate, and {remedy}")

    def record(self, step: int, **figures: float) -> None:
        self.accelerator.log(figures, step)
        if self.accelerator.is_main_process:
            with open(self.folder / "figures.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")

    def validate(self, step: int, network: nn.Module, title: str) -> dict[str, float]:
        """Figures on the validation pictures, the same on every process; the sample sheet goes to samples/TITLE.png."""
        self.share_statistics(network)
        figures, sheet = validate(self.accelerator, network, self.validation_batches)
        self.check(step, figures)
        self.record(step, **{f"validation/{k}": v for k, v in figures.items()})
        self.say(f"{title}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        if self.accelerator.is_main_process:
            write_png(self.folder / "samples" / f"{title}.png", sheet)
            for tracker in self.accelerator.trackers:
                _show(tracker, sheet, step)
        return figures

    def share_statistics(self, network: nn.Module) -> None:
        """Give all processes the batch statistics of the first: each has those of its own pictures."""
        if self.accelerator.num_processes > 1:
            broadcast(list(network.buffers()))

    def spent(self) -> str:
        """Time and hardware so far, for the model card."""
        minutes = (self.seconds + time.monotonic() - self.clock) / 60
        return f"{minutes:.0f} minutes on {self.accelerator.num_processes} x {self.accelerator.device.type}"

    def export(self, network: nn.Module, figures: dict, snapshot: str | None = None, **words: str) -> None:
        """Write checkpoint/ and its card, first its `snapshot`, if it has a name. `words` fill blanks in `card.TEXT`."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        words |= {"spent": self.spent(), "parameters": num_parameters(network)}
        if curves := self.draw():
            shutil.copy(curves, folder / curves.name)
        card = model_card(self.args, figures, curves=curves is not None, **words)
        if snapshot:
            hub.save(network, folder / "snapshots" / snapshot, card)
        hub.save(network, folder, card)

    def draw(self) -> Path | None:
        """curves.png of the run, if matplotlib is there: it comes with the extra `train`."""
        try:
            from plot import plot
        except ImportError:
            return None
        return plot(self.folder)

    def end(self) -> None:
        """After the last step: draw the curves, say what was skipped, publish, and close the trackers."""
        if self.accelerator.is_main_process:
            self.draw()
            damaged = self.folder / "damaged.txt"
            if damaged.is_file():
                skipped = len(set(damaged.read_text().splitlines()))
                self.say(f"{skipped} damaged pictures were skipped: {damaged} names them", logging.WARNING)
            if self.args.push_to_hub:
                self.say(f"published: {hub.push(self.folder / 'checkpoint', self.args.push_to_hub)}")
        self.accelerator.end_training()

    # Saving

    def state_dict(self) -> dict:
        return {"memory": self.memory, "seconds": self.seconds + time.monotonic() - self.clock}

    def load_state_dict(self, state: dict) -> None:
        self.memory, self.seconds = state["memory"], state["seconds"]

    def save(self) -> None:
        """Write state/STEP, under another name until all of it is on the disk; then the states before it go.

        Raises:
            SystemExit: it cannot be written, or a weight is not a number. The state before it stays.
        """
        states = self.folder / "state"
        part, whole = states / f"{self.step:08d}.part", states / f"{self.step:08d}"
        before = newest_state(self.folder)
        stays = f": --resume {self.folder} goes on from {before}" if before else ""
        self.check(self.step, {k: v.sum().item() for network in self.watched for k, v in network.named_parameters()})
        if whole == before:
            return
        error = None
        try:
            self.accelerator.save_state(str(part))
            for path in [*part.iterdir(), part]:
                _sync(path)
        except (OSError, RuntimeError, SafetensorError) as e:
            error = f"{part}: {e}"
        if errors := [e for e in gather_object([error]) if e]:
            if self.accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
            raise SystemExit(f"The state could not be saved: {errors[0]}. Is the disk full? Make room{stays}")
        if self.accelerator.is_main_process:
            part.rename(whole)
            _sync(states)
            for old in states.iterdir():
                if old != whole:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


class Stop:
    """While it is entered, SIGTERM and Ctrl-C only ask; a second Ctrl-C ends the program at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signalled = accelerator, False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.signalled = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop: the same answer on every process, or one would wait for the others for ever."""
        if self.accelerator.num_processes == 1:
            return self.signalled
        if step % AGREE_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(int(self.signalled), device=self.accelerator.device), "sum"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _installed(tracker: str) -> bool:
    if importlib.util.find_spec(tracker) is None and tracker != "tensorboard":  # that is the default: nobody asked for it
        raise SystemExit(f"--trackers {tracker}: it is not installed (python -m pip install {tracker})")
    return importlib.util.find_spec(tracker) is not None


def _show(tracker, sheet, step: int) -> None:
    """A sample sheet (H, W, 3) uint8 RGB, for a tracker that shows pictures."""
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": sheet[None]}, step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({"samples": trackio.Image(sheet)}, step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"samples": [sheet]}, step)


def command() -> str:
    """The command that started this program, for the model card."""
    words = [f"train/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    if "--data-note" in words:  # has a section of its own
        at = words.index("--data-note")
        del words[at : at + 2]
    return shlex.join(["accelerate", "launch", *words])


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
