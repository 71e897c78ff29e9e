"""The fifth model and its program. The encoder's weights are random ones under timm's names."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import batch_norm, conv2d, cross_entropy, interpolate, pad, relu6

from colorize import Colorizer, hub
from colorize.color import rgb_to_lab
from colorize.models import EfficientUNet, EfficientUNetConfig
from colorize.models.efficient_unet import ENCODERS, STAGES, Detail, Encoder, ab_classes
from conftest import PHOTOS
from efficient_unet import Targets, colourfulness, shrink
from pretrained import Perceptual, freeze
from test_train import RANKS, TWICE, figures, interrupt, train


def timm_weights(encoder: str = "lite0") -> dict[str, torch.Tensor]:
    """Shapes and names as timm/tf_efficientnet_lite0.in1k, or 2, has them."""
    random = torch.Generator().manual_seed(0)
    weights = {"classifier.bias": torch.zeros(1000)}  # not ours to use

    def layer(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        spread = (2 / (inputs * kernel**2)) ** 0.5
        weights[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=random) * spread
        weights[f"{norm}.weight"] = torch.rand(outputs, generator=random) + 0.5
        weights[f"{norm}.running_var"] = torch.rand(outputs, generator=random) + 0.5
        weights[f"{norm}.bias"] = torch.randn(outputs, generator=random) * 0.5
        weights[f"{norm}.running_mean"] = torch.randn(outputs, generator=random) * 0.5

    layer("conv_stem", "bn1", 32, 3, 3)
    inputs = 32
    for i, ((kernel, _, expansion), (blocks, outputs)) in enumerate(zip(STAGES, ENCODERS[encoder], strict=True)):
        for j in range(blocks):
            block, wide = f"blocks.{i}.{j}", inputs * expansion
            if expansion == 1:
                layer(f"{block}.conv_dw", f"{block}.bn1", wide, 1, kernel)
                layer(f"{block}.conv_pw", f"{block}.bn2", outputs, wide, 1)
            else:
                layer(f"{block}.conv_pw", f"{block}.bn1", wide, inputs, 1)
                layer(f"{block}.conv_dw", f"{block}.bn2", wide, 1, kernel)
                layer(f"{block}.conv_pwl", f"{block}.bn3", outputs, wide, 1)
            inputs = outputs
    return weights


WEIGHTS = timm_weights()


def reference(rgb: torch.Tensor, weights: dict[str, torch.Tensor], encoder: str) -> list[torch.Tensor]:
    """(B, 3, H, W) -> the output of every stage, as TensorFlow computes it: padding first, batch norms by themselves."""

    def step(x, conv, norm, stride=1, act=True):
        kernel = weights[f"{conv}.weight"].double()
        missing = [max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0) for n in (x.shape[3], x.shape[2])]
        x = pad(x, [side for n in missing for side in (n // 2, n - n // 2)])
        x = conv2d(x, kernel, stride=stride, groups=len(kernel) if "_dw" in conv else 1)
        mean, var, gain, shift = (weights[f"{norm}.{k}"].double() for k in ("running_mean", "running_var", "weight", "bias"))
        x = batch_norm(x, mean, var, gain, shift, eps=1e-3)
        return relu6(x) if act else x

    x, stages = step(rgb, "conv_stem", "bn1", 2), []
    for i, ((_, stride, expansion), (blocks, _)) in enumerate(zip(STAGES, ENCODERS[encoder], strict=True)):
        for j in range(blocks):
            b, s = f"blocks.{i}.{j}.", stride if j == 0 else 1
            if expansion == 1:
                y = step(step(x, b + "conv_dw", b + "bn1", s), b + "conv_pw", b + "bn2", act=False)
            else:
                y = step(step(x, b + "conv_pw", b + "bn1"), b + "conv_dw", b + "bn2", s)
                y = step(y, b + "conv_pwl", b + "bn3", act=False)
            x = x + y if j else y
        stages.append(x)
    return stages


@pytest.fixture(scope="module")
def model() -> EfficientUNet:
    torch.manual_seed(0)
    model = EfficientUNet(EfficientUNetConfig(width=8)).eval()
    model.encoder = Encoder.from_timm(WEIGHTS)
    return model


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_computes_what_timm_s_does(encoder):
    weights = timm_weights(encoder)
    gray = torch.rand(2, 1, 64, 96, dtype=torch.float64) * 2 - 1
    ours = Encoder.from_timm(weights)
    with torch.inference_mode():
        stages = reference(gray.expand(-1, 3, -1, -1), weights, encoder)
        levels = ours.double()(gray)
    for found, i in zip(levels, (0, 1, 2, 4, 6), strict=True):
        assert torch.allclose(found, stages[i], rtol=1e-4, atol=1e-4 * stages[i].abs().max())
    channels = {"lite0": (16, 24, 40, 112, 320), "lite2": (16, 24, 48, 120, 352)}[encoder]
    assert [f.shape[1:] for f in levels] == [(c, 32 >> i, 48 >> i) for i, c in enumerate(channels)]
    model = EfficientUNet(EfficientUNetConfig(encoder=encoder, width=8))
    model.encoder.load_state_dict(ours.state_dict())
    assert ours.name == encoder and model(gray.float()).shape == (2, 2, 64, 96)


def test_weights_of_something_else_are_refused_by_name():
    for change, said in (
        ({"blocks.3.1.conv_dw.weight": torch.zeros(480, 1, 5, 5)}, r"blocks\.3\.1\.conv_dw\.weight is \(480, 1, 5, 5\)"),
        ({"bn1.bias": torch.zeros(31)}, r"bn1\.bias is \(31,\), not \(32,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            Encoder.from_timm(WEIGHTS | change)
    with pytest.raises(ValueError, match="conv_stem.weight is missing"):
        Encoder.from_timm({})


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (33, 7), (64, 64), (97, 130)])
def test_any_height_and_width(size, stride):
    model = EfficientUNet(EfficientUNetConfig(width=4, stride=stride)).eval()
    with torch.inference_mode():
        lightness = torch.rand(2, 1, *size) * 2 - 1
        ab, logits = model(lightness, classes=True)
        assert torch.equal(ab, model(lightness))
    assert ab.shape == (2, 2, *size) and ab.isfinite().all() and ab.abs().max() <= 1
    assert logits.shape == (2, 225, -(-size[0] // stride), -(-size[1] // stride))


def test_size_by_default_and_bounds():
    with torch.device("meta"):
        assert sum(p.numel() for p in EfficientUNet().parameters()) < 15e6
    for name, values in {"width": [7], "stride": [8], "temperature": [0.0, 1.5], "chroma": [-1.0], "detail": [-1]}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                EfficientUNetConfig(**{name: value})


def test_classes_are_near_every_colour_of_srgb():
    colours = ab_classes() * 110
    assert colours.shape == (225, 2) and (colours - colours.round(decimals=-1)).abs().max() < 1e-4
    assert (colours.abs().sum(1) == 0).sum() == 1  # gray is one of them
    lab = rgb_to_lab(torch.rand(1, 3, 100, 100, generator=torch.Generator().manual_seed(0)))
    assert torch.cdist(lab[0, 1:].flatten(1).T, colours).amin(1).max() < 10


def test_decoding_goes_from_the_mean_to_the_mode():
    logits = torch.randn(1, 225, 3, 4, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 42, 1, 2] = 8  # ahead, but no mode by itself: the others together have more
    decode = {t: EfficientUNet(EfficientUNetConfig(width=2, temperature=t)).decode(logits) for t in (1.0, 0.38, 0.01)}
    shares = logits[0, :, 1, 2].softmax(0)
    assert torch.allclose(decode[1.0][0, :, 1, 2], shares @ ab_classes(), atol=1e-6)
    annealed = shares.log().div(0.38).exp()  # equation 5 of Zhang et al.
    assert torch.allclose(decode[0.38][0, :, 1, 2], annealed @ ab_classes() / annealed.sum(), atol=1e-6)
    assert torch.allclose(decode[0.01][0, :, 1, 2], ab_classes()[42], atol=1e-6)
    vivid = EfficientUNet(EfficientUNetConfig(width=2, temperature=1.0, chroma=1.5)).decode(logits)
    assert torch.allclose(vivid, decode[1.0] * 1.5)


def test_detail_leaves_colours_alone_until_it_has_learnt():
    detail = Detail(8, 4)
    ab, features, lightness = torch.rand(1, 2, 8, 10) - 0.5, torch.randn(1, 8, 8, 10), torch.rand(1, 1, 32, 40) * 2 - 1
    with torch.inference_mode():
        smooth = interpolate(ab, scale_factor=2, mode="bilinear")
        assert torch.equal(detail(ab, features, lightness), smooth)
        detail.convs[-1].weight.fill_(0.1)
        before = detail(ab, features, lightness)
        lightness[..., 16:18, 20:22] = 1  # one place of the result
        change = (detail(ab, features, lightness) - before).abs().amax(1)[0]
    assert change[8, 10] > 1e-3 and change[:5].max() == 0 and change[12:].max() == 0


def test_saved_and_loaded_strictly(model, tmp_path):
    hub.save(model, tmp_path)
    back = hub.load(tmp_path)
    assert back.config == model.config and "colours" not in back.state_dict()
    lightness = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(back(lightness), model(lightness), atol=0.02)
    weights = load_file(tmp_path / hub.WEIGHTS)
    weights["encoder.bn1.bias"] = weights.pop("encoder.conv_stem.bias")
    save_file(weights, tmp_path / hub.WEIGHTS)
    with pytest.raises(hub.CheckpointError, match="2 tensors: 'encoder.bn1.bias'"):
        hub.load(tmp_path)


# Training


@pytest.fixture(scope="module")
def targets() -> Targets:
    return Targets(ab_classes())


def colours(*shape: int) -> torch.Tensor:
    """ab that photographs have: most of it near gray."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(0.1).clamp(-1, 1)


def test_the_loss_is_cross_entropy_to_the_nearest_five(targets):
    ab = (colours(2, 2, 3, 4) * 110).round() / 110  # what the table knows to the digit
    logits = torch.randn(2, 225, 3, 4, generator=torch.Generator().manual_seed(1))
    distance = torch.cdist(ab.permute(0, 2, 3, 1).reshape(-1, 2), ab_classes()) * 110  # (24, 225)
    soft = torch.exp(-(distance**2) / 50)
    soft[distance > distance.topk(5, largest=False).values[:, -1:]] = 0
    expected = cross_entropy(logits.permute(0, 2, 3, 1).reshape(-1, 225), soft / soft.sum(1, keepdim=True))
    assert torch.allclose(targets(logits, ab), expected, rtol=1e-4)


def test_rare_colours_weigh_more_and_all_together_one():
    targets = Targets(ab_classes())
    gray, green = (int((ab_classes() * 110 - torch.tensor(ab)).norm(dim=1).argmin()) for ab in ((0.0, 0.0), (-60.0, 60.0)))
    for uniform, ratio in ((0.0, 100), (0.5, 10), (0.9, 2), (1.0, 1)):
        targets.count([colours(4, 2, 32, 32)], uniform)
        assert (targets.weights * targets.prior).sum() == pytest.approx(1, abs=1e-4)
        assert targets.weights[green] / targets.weights[gray] >= ratio * (1 - 1e-6)
    assert torch.allclose(targets.weights, torch.ones(225))


def test_colourfulness_of_what_is_known():
    ab = torch.zeros(1, 2, 16, 16)
    assert colourfulness(ab).item() == pytest.approx(0, abs=2e-3)
    ab[:, 0] = 0.5
    assert colourfulness(ab).item() == pytest.approx(0.37 * 0.5, abs=2e-3)
    ab[:, 1] = torch.tensor([1.0, -1.0]).repeat(8)
    assert colourfulness(ab).item() == pytest.approx(1 + 0.37 * 0.5, abs=2e-3)


def test_a_bright_line_is_not_colourful():
    ab = torch.zeros(1, 2, 48, 48)
    ab[..., 0] = 1
    assert colourfulness(ab).item() == pytest.approx(0, abs=2e-3)
    line, even = torch.zeros(1, 2, 48, 48), torch.zeros(1, 2, 48, 48)
    line[:, 1, :, 24], even[:, 1, :, ::2] = 1, 0.1
    assert colourfulness(line) < colourfulness(even)  # their standard deviations are 0.14 and 0.05


def test_truth_and_logits_have_the_same_size(model):
    ab, logits = model(torch.zeros(1, 1, 37, 50), classes=True)
    assert shrink(ab, 4).shape[2:] == logits.shape[2:]


def test_all_that_may_learn_does(targets):
    model = EfficientUNet(EfficientUNetConfig(width=8)).train()
    model.encoder = Encoder.from_timm(WEIGHTS)
    freeze(model.encoder, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or name == "detail.convs.4.weight":
            parameter.data.fill_(0.1)  # what is new says nothing, so what it is made from could not be heard
    ab, logits = model(torch.rand(2, 1, 64, 64) * 2 - 1, classes=True)
    (targets(logits, colours(2, 2, 16, 16)) + ab.square().mean()).backward()
    gradients = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
    frozen = {name for name in gradients if name.startswith(("encoder.conv_stem", "encoder.blocks.0", "encoder.blocks.1"))}
    frozen |= {name for name in gradients if "conv_dw" in name}
    assert {name for name, moves in gradients.items() if not moves} == frozen


def test_what_looks_alike_is_near(tmp_path):
    save_file(WEIGHTS, tmp_path / "encoder.safetensors")
    perceptual = Perceptual(str(tmp_path / "encoder.safetensors"))
    lightness, ab = torch.rand(2, 1, 160, 192) * 2 - 1, colours(2, 2, 160, 192)
    painted = (ab * 0.5).requires_grad_()
    near, far = perceptual(lightness, painted, ab), perceptual(lightness, -ab, ab)
    assert perceptual(lightness, ab, ab) == 0 and 0 < near < far
    near.backward()
    seen = painted.grad[0, 0].nonzero().aminmax(dim=0)  # in a window of 128 x 128
    assert painted.grad.isfinite().all() and (seen.max - seen.min).tolist() == pytest.approx([127, 127], abs=2)


PROGRAM = ["train/efficient_unet.py", "--image-size", 64, "--batch-size", 2, "--epoch-steps", 4, "--warmup-steps", 1]
PROGRAM += ["--validate-every", 2, "--validation-pictures", 2, "--prior-pictures", 4, "--width", 8, "--mixed-precision", "no"]
PROGRAM += ["--l1-weight", 1, "--colourfulness-weight", 1, "--old-prints", 0.5, "--perceptual-weight", 1]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list:
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file({k: v.half() for k, v in WEIGHTS.items()}, file)
    return [*PROGRAM, "--dataset", PHOTOS[0].parent, "--encoder", file, "--trackers"]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("efficient-unet") / "run"
    train(*words, "--run", run, "--workers", 0)
    return run


def test_the_export_colours(run):
    model = hub.load(run / "checkpoint")
    result = np.asarray(Colorizer(model, device="cpu")(PHOTOS[0])).astype(int)
    assert np.ptp(result, axis=-1).max() > 0 and model.config.image_size == 64
    card = (run / "checkpoint" / "README.md").read_text()
    assert "accelerate launch train/efficient_unet.py --" in card and "225 colours" in card
    assert len(figures(run, "validation/l1")) == 2


def test_goes_on_from_a_checkpoint_with_settings_of_its_own(words, run, tmp_path):
    words = [*words, "--encoder", "none", "--temperature", 0.5, "--perceptual-weight", 0]
    train(*words, "--run", tmp_path, "--workers", 0, "--start", run / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / hub.CONFIG).read_text())
    assert config["temperature"] == 0.5 and config["width"] == 8


def test_the_encoder_begins_as_it_was_given_and_learns_slowly(run):
    """What is frozen is still as the file has it, folded; of the rest nothing has moved far in four steps."""
    begun, now = Encoder.from_timm({k: v.half() for k, v in WEIGHTS.items()}), hub.load(run / "checkpoint").encoder
    for name, before in begun.state_dict().items():
        moved = (now.state_dict()[name] - before.half().float()).abs().max()
        learns = name.startswith(("blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6")) and "conv_dw" not in name
        assert 0 < moved < 0.01 if learns else moved == 0, name


def test_its_gan_leaves_the_encoder_alone(words, run, tmp_path):
    shared = words[words.index("--old-prints") :]  # the last of its flags are the GAN's too
    words = ["train/gan.py", "--start", run / "checkpoint", "--image-size", 128, "--batch-size", 2, *shared, "--workers", 0]
    words += ["--epochs", 1, "--epoch-steps", 2, "--critic-filters", 4, "--critic-layers", 2, "--validation-pictures", 2]
    train(*words, "--run", tmp_path)
    before, after = (hub.load(folder / "checkpoint").state_dict() for folder in (run, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"head.weight", "detail.convs.4.weight"} < changed and not any(name.startswith("encoder.") for name in changed)
    assert hub.snapshots(tmp_path / "checkpoint") == ["epoch-001"]
    assert "# efficient-unet-gan" in (tmp_path / "checkpoint" / "README.md").read_text()


def test_resumes_bit_for_bit(words, tmp_path):
    words = [*words, "--workers", 0, "--epoch-steps", 16, "--save-every", 2]
    train(*words, "--run", tmp_path / "whole")
    code, log = interrupt(signal.SIGKILL, tmp_path / "run", *words)
    assert code == -signal.SIGKILL, log[-3000:]
    train("train/efficient_unet.py", "--resume", tmp_path / "run")
    for file in ("state/00000016/model.safetensors", "checkpoint/model.safetensors"):  # the last step's, and their mean
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_processes_end_with_the_same_weights(words, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    words = [*words, "--workers", 0, "--run", tmp_path]
    train(tmp_path / "ranks.py", *words, launcher=TWICE, env={"ACCELERATE_USE_CPU": "true"})
    first, second = (torch.load(tmp_path / f"rank-{i}.pt") for i in (0, 1))
    assert len(first) > 10 and all(map(torch.equal, first, second))


def test_what_is_no_encoder_is_refused_before_anything_is_written(words, run, tmp_path):
    for encoder, said in (
        ("nothing.safetensors", "nothing.safetensors cannot be read"),
        ("nobody/nothing", "nobody/nothing cannot be read"),
        (run / "checkpoint" / hub.WEIGHTS, "conv_stem.weight is missing"),
    ):
        log = train(*words, "--encoder", encoder, "--run", tmp_path / "run", "--dry-run", fails=True)
        assert said in log and "Traceback" not in log and not (tmp_path / "run").exists()
