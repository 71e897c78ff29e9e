"""The model card of a checkpoint: what it is, how it was trained, how well it does, where it fails."""

import argparse

from huggingface_hub import EvalResult, ModelCard, ModelCardData

NO_RECIPE = {
    "command",
    "data_note",
    "dataset",
    "dry_run",
    "push_to_hub",
    "resume",
    "run",
    "save_every",
    "trackers",
    "workers",
}  # flags that say nothing of the recipe

TEXT = """# {name}

{summary}

```python
from colorize import Colorizer

Colorizer.from_pretrained("checkpoints/{name}")("photo.jpg").save("colour.png")
```

## Training

Command:

```bash
{command}
```

| setting | value |
|---|---|
| parameters | {parameters:,} |
| trained for | {spent} |
{settings}

## Data

{data}

## Figures

On {pictures} validation pictures of {size} x {size} pixels, none of them trained on. PSNR and L1 reward grey: see the gray row.

| | L1 of ab | PSNR, dB | colourfulness, share of the truth's |
|---|---|---|---|
| gray | {gray_l1:.4f} | {gray_psnr:.2f} | 0.00 |
| {name} | {l1:.4f} | {psnr:.2f} | {colourfulness_ratio:.2f} |
{table}{curves}
## Where it fails

{failures}
"""


def model_card(
    args: argparse.Namespace, figures: dict, *, name: str, table: str = "", curves: bool = False, **words: str | int
) -> str:
    """The text of README.md.

    `args` are the program's flags, `figures` those of `validation.validate`, `table` more of them, `words` what else `TEXT` has
    blanks for. `curves` says whether curves.png stands beside the card.
    """
    settings = {k: v for k, v in vars(args).items() if k not in NO_RECIPE and v not in (None, False)}
    dataset = str(args.dataset)
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type="images",
            dataset_name=dataset,
            metric_type=k,
            metric_value=round(figures[k], 4),
        )
        for k in ("psnr", "colourfulness_ratio", "l1")
    ]
    data = ModelCardData(
        license="apache-2.0", library_name="colorize", pipeline_tag="image-to-image", tags=["image-colorization"],
        metrics=["psnr"], model_name=name, eval_results=results,
    )  # fmt: skip
    text = TEXT.format(
        name=name,
        command=args.command,
        table=table and f"\n{table}\n",
        settings="\n".join(f"| {k.replace('_', ' ')} | {v} |" for k, v in settings.items()),
        data=args.data_note or f"`{dataset}`; the licence of its pictures is not known to this program.",
        curves="\n![Losses and learning rate over the steps](curves.png)\n" if curves else "",
        pictures=args.validation_pictures, size=args.image_size, **figures, **words,
    )  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
