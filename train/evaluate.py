"""How well checkpoints colour photographs that they were not trained on: a table, and pictures of the best, median and worst.

    accelerate launch train/evaluate.py unet-attention runs/gan/checkpoint@epoch-003 --dataset PHOTOS

Each photograph goes the way of the product: its gray in 8 bits in, RGB in 8 bits out, at full resolution, and is compared with
what it was. The row of plain gray comes first, since colour difference, PSNR and SSIM reward grey. In the folder `--output` are
then figures.md, figures.json and, for each checkpoint, NAME-cases.png. Several processes share the photographs out and write
the same files, byte for byte.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, ImageDraw, ImageFont, ImageOps
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm import tqdm

from colorize import Colorizer, PictureError, hub, read
from colorize.atomic import atomic
from colorize.color import lightness_to_gray, rgb_to_lightness
from colorize.metrics import colourfulness, psnr
from data import held_out

COLUMNS = {  # key in figures.json: heading and digits in figures.md
    "colourfulness": ("colourfulness", 2),
    "colourfulness_ratio": ("colourfulness, share of the truth's", 2),
    "dcf_of_means": ("dCF, of the means", 2),
    "dcf": ("dCF, mean", 2),
    "ciede2000": ("CIEDE2000", 2),
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "fid": ("FID", 2),
}
CASES = 4  # of the best, the median and the worst, each
CELL, LABEL = 160, 20  # pixels: side of a picture, height of the line below it

# The key `model-index` of a model card's YAML with its value: indented lines and list items, and what is blank between them.
MODEL_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ \t]*(?:#.*)?\r?\n)*(?!---)[ \t-].*\n)*", re.MULTILINE)


def flags() -> argparse.ArgumentParser:
    f = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    f.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder, name or Hub id; with @epoch-003 its snapshot")
    f.add_argument("--dataset", required=True, help="its split `validation`, or all of a folder or list of pictures")
    f.add_argument("--pictures", type=int, metavar="N", help="only the first N")
    f.add_argument("--size", type=int, metavar="PIXELS", help="what the network sees of the short side (default: its own)")
    f.add_argument("--output", type=Path, default=Path("runs/evaluation"), metavar="FOLDER", help="default: runs/evaluation")
    f.add_argument("--write-card", action="store_true", help="put the figures into the model card of each checkpoint, too")
    return f


def main() -> None:
    args = flags().parse_args()
    cards = {word: card_folder(word) for word in args.checkpoints if args.write_card}
    accelerator = Accelerator()
    torch.set_num_threads(1)  # on a CPU the last digit depends on their number; processes are what makes this fast
    try:
        colorizers = {word: load(word, accelerator.device) for word in args.checkpoints}
        for colorizer in colorizers.values():
            colorizer([], size=args.size)  # a size out of range is refused here, not at the first picture
    except ValueError as error:
        raise SystemExit(str(error)) from error
    rows = held_out(args.dataset)
    with accelerator.main_process_first():  # the others find the nets in its cache
        nets, missing = deep_nets(accelerator.device)

    numbers = range(len(rows))[: args.pictures][accelerator.process_index :: accelerator.num_processes]
    scale = accelerator.num_processes if accelerator.num_processes > 1 else False  # the bar shows the pace of all
    bar = tqdm(numbers, unit="picture", unit_scale=scale, disable=not accelerator.is_main_process)
    judged = gather_object([judge(number, rows[number], colorizers, args.size, nets) for number in bar])
    if accelerator.is_main_process:
        judged.sort(key=lambda record: record["number"])
        report(args, rows, colorizers, judged, nets, missing, cards)
    accelerator.end_training()


def load(word: str, device: torch.device) -> Colorizer:
    name, _, revision = (word, "", "") if Path(word).is_dir() else word.partition("@")
    return Colorizer.from_pretrained(name, revision or None, device)


def card_folder(word: str) -> Path:
    folder = Path(word) if Path(word).is_dir() else hub.checkpoints().get(word)
    if folder is None:
        raise SystemExit(
            f"--write-card needs the folder of a checkpoint, which {word} is not: `hf download USER/NAME --local-dir FOLDER` "
            "makes one of a Hub id, and a snapshot has no card of its own"
        )
    return folder


def deep_nets(device: torch.device) -> tuple[dict, str]:
    """-> (the metrics "lpips" and "fid" as far as they can be had, a line on those that cannot or "")."""
    kinds = {
        "lpips": partial(LearnedPerceptualImagePatchSimilarity, "alex", normalize=True),
        "fid": partial(FrechetInceptionDistance, sync_on_compute=False),
    }
    nets, missing = {}, []
    for name, kind in kinds.items():
        try:
            nets[name] = kind().to(device)
        except (ImportError, OSError) as error:  # a library is not installed, or a net cannot be downloaded
            missing.append(f"{name.upper()} ({str(error).partition('. ')[0]})")
    remedy = "`python -m pip install 'torchmetrics[image]'` brings the libraries; the nets are downloaded at the first use."
    return nets, f"Not measured: {', '.join(missing)}. {remedy}" if missing else ""


# One photograph


def open_row(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """A row of the data set -> the photograph (H, W, 3) and its gray (H, W), both sRGB in uint8.

    Raises:
        PictureError: it cannot be read.
    """
    image = row["image"]
    truth = np.array(read(image["path"] if image["bytes"] is None else image["bytes"]).to_pil().convert("RGB"))
    gray = lightness_to_gray(rgb_to_lightness(to_tensor(truth)))[0, 0]
    return truth, (gray * 255).round().byte().numpy()


def to_tensor(rgb: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255


@torch.inference_mode()
def judge(number: int, row: dict, colorizers: dict[str, Colorizer], size: int | None, nets: dict) -> dict:
    """All figures of one photograph: `{"number", "name", "truth", "figures": {"gray": {...}, NAME: {...}}, "features"}`.

    `truth` is its colourfulness; `features` are those that FID compares, by name. A damaged one has a key `damaged` instead.
    """
    record = {"number": number, "name": Path(row["image"]["path"] or f"picture {number}").name, "figures": {}, "features": {}}
    try:
        truth, gray = open_row(row)
    except PictureError:
        return {**record, "damaged": True}
    record["truth"] = colourfulness(to_tensor(truth)).item()
    results = {"gray": np.dstack([gray] * 3)} | {k: colorizer(gray, size=size).pixels for k, colorizer in colorizers.items()}
    for name, rgb in results.items():
        record["figures"][name] = compare(rgb, truth)
        if "lpips" in nets:
            pair = [to_tensor(x).to(nets["lpips"].device) for x in (rgb, truth)]
            record["figures"][name]["lpips"] = nets["lpips"](*pair).item()
    if "fid" in nets:
        pictures = {name: torch.from_numpy(rgb).permute(2, 0, 1)[None] for name, rgb in {"truth": truth, **results}.items()}
        record["features"] = {name: nets["fid"].inception(x.to(nets["fid"].device)).cpu() for name, x in pictures.items()}
    return record


def compare(rgb: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Two photographs (H, W, 3) uint8 -> the figures of the first that need no net.

    CIEDE2000 is the mean over the pixels; SSIM is that of Wang et al. (2004) (Gaussian window, sigma 1.5), mean of R, G and B.
    """
    return {
        "colourfulness": colourfulness(to_tensor(rgb)).item(),
        "ciede2000": deltaE_ciede2000(rgb2lab(truth), rgb2lab(rgb)).mean().item(),
        "psnr": psnr(to_tensor(rgb), to_tensor(truth)).item(),
        "ssim": structural_similarity(
            rgb, truth, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        ).item(),
    }


# All of them


def report(args, rows, colorizers: dict[str, Colorizer], judged: list[dict], nets: dict, missing: str, cards: dict) -> None:
    """Write and print what was found; `judged` has a record of `judge` for each photograph."""
    damaged = [record["name"] for record in judged if "damaged" in record]
    judged = [record for record in judged if "damaged" not in record]
    if not any(record["truth"] for record in judged):
        raise SystemExit(f"{args.dataset}: no picture in colour could be read ({len(damaged)} are damaged)")
    truth = np.mean([record["truth"] for record in judged]).item()
    figures = {name: summarise(name, judged) for name in ("gray", *colorizers)}
    if "fid" in nets and len(judged) > 1:
        for name in figures:
            figures[name]["fid"] = fid(nets["fid"], name, judged)

    notes = [f"Photographs: {len(judged)} of {args.dataset}; their own colourfulness: {truth:.2f}."]
    if args.size:
        notes += [f"The networks saw {args.size} pixels of the short side."]
    if damaged:
        notes += [f"Damaged and left out: {len(damaged)} ({', '.join(damaged)})."]
    notes += [missing] if missing else []
    text = "\n\n".join([table(figures), *notes]) + "\n"
    everything = {"dataset": args.dataset, "pictures": len(judged), "damaged": damaged, "size": args.size}
    everything |= {"truth_colourfulness": truth, "not_measured": missing, "figures": figures}

    args.output.mkdir(parents=True, exist_ok=True)
    with atomic(args.output / "figures.md") as path:
        path.write_text(text)
    with atomic(args.output / "figures.json") as path:
        path.write_text(json.dumps(everything, indent=2) + "\n")
    for name, colorizer in colorizers.items():
        file = re.sub(r"[^\w.@-]+", "-", name).strip(".-") + "-cases.png"
        with atomic(args.output / file) as path:
            draw_cases(rows, judged, name, partial(colorizer, size=args.size)).save(path)
    for name, folder in cards.items():
        write_card(folder, args, len(judged), figures[name])
    print(text)


def summarise(name: str, judged: list[dict]) -> dict[str, float]:
    """Means over the photographs, and the two dCF of the field: difference of the means, and mean of the differences."""
    own = [record["figures"][name] for record in judged]
    means = {key: np.mean([figures[key] for figures in own]).item() for key in own[0]}
    truths = np.array([record["truth"] for record in judged])
    means["colourfulness_ratio"] = means["colourfulness"] / truths.mean().item()
    means["dcf_of_means"] = abs(means["colourfulness"] - truths.mean().item())
    means["dcf"] = np.abs([figures["colourfulness"] for figures in own] - truths).mean().item()
    return {key: means[key] for key in COLUMNS if key in means}


def fid(metric: FrechetInceptionDistance, name: str, judged: list[dict]) -> float:
    metric = metric.cpu()
    metric.reset()
    metric.inception = torch.nn.Identity()  # the processes have done its part
    for key, real in (("truth", True), (name, False)):
        metric.update(torch.cat([record["features"][key] for record in judged]), real=real)
    return metric.compute().item()


def table(figures: dict[str, dict[str, float]]) -> str:
    columns = {key: column for key, column in COLUMNS.items() if key in figures["gray"]}
    lines = ["| | " + " | ".join(heading for heading, _ in columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in figures.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.{digits}f}" for key, (_, digits) in columns.items()) + " |")
    return "\n".join(lines)


def draw_cases(rows, judged: list[dict], name: str, colorize) -> Image.Image:
    """The best, median and worst by CIEDE2000, each as gray, output and truth; two of them in a line."""
    order = sorted(judged, key=lambda record: record["figures"][name]["ciede2000"])
    count = min(CASES, max(len(order) // 3, 1))
    starts = {"best": 0, "median": (len(order) - count) // 2, "worst": len(order) - count}
    cases = [(kind, record) for kind, start in starts.items() for record in order[start : start + count]]

    lines = count // 2 + count % 2  # of each kind
    sheet = Image.new("RGB", (6 * CELL + LABEL, 3 * lines * (CELL + LABEL)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (kind, record) in enumerate(cases):
        line = i // count * lines + i % count // 2
        left, top = i % count % 2 * (3 * CELL + LABEL), line * (CELL + LABEL)
        truth, gray = open_row(rows[record["number"]])
        for column, pixels in enumerate((gray, colorize(gray).pixels, truth)):
            cell = ImageOps.pad(Image.fromarray(pixels).convert("RGB"), (CELL, CELL), color="white", centering=(0.5, 1))
            sheet.paste(cell, (left + column * CELL, top))
        own = record["figures"][name]
        colour = f"colourfulness {own['colourfulness']:.0f} of {record['truth']:.0f}"
        label = f"{kind}: {record['name'][:24]}, dE00 {own['ciede2000']:.1f}, PSNR {own['psnr']:.1f} dB, {colour}"
        pen.text((left, top + CELL + 2), label, fill="black", font=font)
    return sheet


def write_card(folder: Path, args, pictures: int, figures: dict[str, float]) -> None:
    """Put figures into the `model-index` of a checkpoint's README.md, instead of older ones of the same data set.

    Every other byte of the card stays as it is.
    """
    path = folder / hub.CARD
    text = path.read_bytes().decode() if path.is_file() else ""
    card = ModelCard(text)
    front = text.removesuffix(card.text) or "---\n---\n"
    kept = [result for result in card.data.eval_results or [] if result.dataset_name != args.dataset]
    new = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=args.dataset,  # results of one type would be taken for one data set's
            dataset_name=args.dataset,
            dataset_args={"pictures": pictures} | ({"size": args.size} if args.size else {}),
            metric_type=key,
            metric_name=COLUMNS[key][0],
            metric_value=round(value, 4),
        )
        for key, value in figures.items()
    ]
    newline = "\r\n" if "\r\n" in front else "\n"
    name = card.data.get("model_name") or folder.resolve().name
    index = ModelCardData(model_name=name, eval_results=kept + new).to_yaml(line_break=newline) + newline
    if MODEL_INDEX.search(front):
        front = MODEL_INDEX.sub(lambda _: index, front)
    else:
        end = front.rindex("---")
        front = front[:end] + index + front[end:]
    with atomic(path) as part:
        part.write_bytes((front + card.text).encode())


if __name__ == "__main__":
    main()
