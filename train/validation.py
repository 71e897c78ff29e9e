"""How a network does on pictures that it was not trained on: figures, and samples to look at."""

import cv2
import numpy as np
import torch
from accelerate import Accelerator

from colorize.atomic import atomic
from colorize.color import lab_to_rgb, network_to_lab
from colorize.colorizer import predict_ab
from colorize.metrics import colourfulness, psnr
from data import to_network


@torch.inference_mode()
def validate(accelerator: Accelerator, model: torch.nn.Module, batches, samples: int = 12):
    """-> (figures, sample sheet).

    Figures are means over all pictures: `l1` of ab, `psnr` in dB, and `colourfulness_ratio`, output to truth; those of plain
    gray stand beside them as `gray_l1` and `gray_psnr`. The sheet is (3 * H, samples * W, 3) uint8 RGB: gray, output and truth
    as three rows.
    """
    training = model.training
    model.eval()
    rows, sheet = [], None
    for batch in batches:
        lightness, ab = to_network(batch)
        with accelerator.autocast():
            painted = predict_ab(model, lightness).float()
        gray, output, truth = (lab_to_rgb(network_to_lab(lightness, x)) for x in (torch.zeros_like(ab), painted, ab))
        figures = torch.stack((
            (painted - ab).abs().mean((1, 2, 3)), ab.abs().mean((1, 2, 3)), psnr(output, truth), psnr(gray, truth),
            colourfulness(output), colourfulness(truth),
        ), dim=1)  # (B, 6)  # fmt: skip
        rows.append(accelerator.gather_for_metrics(figures))
        if sheet is None:
            strips = [torch.cat(list(x[:samples]), dim=2) for x in (gray, output, truth)]  # each (3, H, samples * W)
            sheet = (torch.cat(strips, dim=1).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    model.train(training)
    l1, gray_l1, ours, grays, colour, true_colour = torch.cat(rows).mean(0).tolist()
    figures = {"l1": l1, "gray_l1": gray_l1, "psnr": ours, "gray_psnr": grays, "colourfulness_ratio": colour / true_colour}
    return figures, sheet


def write_png(path, rgb: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        cv2.imwrite(str(part), rgb[..., ::-1])
