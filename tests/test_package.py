"""The house rules that a test can keep: which way imports flow, what the package promises, what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import colorize


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_public_names_are_there_and_are_all():
    assert sorted(colorize.__all__) == colorize.__all__
    public = {n for n, v in vars(colorize).items() if not n.startswith("_") and not isinstance(v, type(sys))}
    assert public == set(colorize.__all__)


def test_library_imports_neither_the_app_nor_training():
    loaded = run("import sys, colorize, colorize.cli, colorize.metrics; print(*sys.modules)").split()
    assert not {"gradio", "accelerate", "datasets", "train", "app"} & set(loaded)


@pytest.mark.parametrize(
    "module, siblings",
    [
        ("color", set()),
        ("models", {"color", "models"}),
        ("metrics", {"steady"}),
        ("picture", {"atomic", "picture", "encode"}),
        ("hub", {"atomic", "models", "hub"}),
        ("archive", {"colorizer", "picture"}),
        ("yuv", {"color"}),
        ("steady", set()),
        ("film", {"atomic", "color", "colorizer", "encode", "picture", "steady", "yuv"}),
        ("colorizer", {"atomic", "color", "models", "hub", "picture", "encode"}),
    ],
)
def test_imports_flow_one_way(root, module, siblings):
    files = sorted((root / "colorize" / module).glob("*.py")) or [root / "colorize" / f"{module}.py"]
    imported = set()
    for file in files:
        dots = r"^from \.(\w*) import (.*)" if len(files) == 1 else r"^from \.\.(\w*) import (.*)"
        for where, names in re.findall(dots, file.read_text(), flags=re.M):
            imported |= {where} if where else {n.strip() for n in names.split(",")}
    assert imported <= siblings


def test_nothing_happens_on_import(tmp_path):
    program = "import os; before = set(os.environ); import colorize; assert set(os.environ) == before; print(os.listdir('.'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(root, words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def commands(root) -> list[str]:
    readme = (root / "README.md").read_text()
    return [line for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.S) for line in block.splitlines()]


def test_ci_runs_the_tests_exactly_as_the_readme_says(root):
    line = next(c for c in commands(root) if c.endswith("python -m pytest -n 2 --dist loadfile"))
    assert line in (root / ".ci" / "run").read_text().splitlines()


def test_readme_commands_colour_pictures(root, tmp_path):
    """In a folder with the examples and a scan, as the lines stand there."""
    (tmp_path / "examples").symlink_to(root / "examples")
    colorize.read(next((root / "examples").glob("*.jpg"))).save(tmp_path / "scan.tif")
    lines = [c for c in commands(root) if c.startswith("colorize ")]
    assert len(lines) == 3
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        "\n".join(["set -e", *lines]), shell=True, cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "colour").iterdir())) == len(list((root / "examples").glob("*.jpg")))
    assert (tmp_path / "colour.tif").exists() and "unet-attention-gan" in done.stdout


def test_readme_python_colours_a_picture(root, tmp_path):
    readme = (root / "README.md").read_text()
    snippet = next(b for b in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "Colorizer" in b)
    (tmp_path / "examples").symlink_to(root / "examples")
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    assert colorize.read(tmp_path / "colour.png").pixels.ndim == 3


def test_readme_names_files_that_are_there(root):
    readme = (root / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", readme, flags=re.S).group(1)
    links = re.findall(r"\]\(([\w./-]+)\)", readme)
    for name in [*re.findall(r"^([\w./-]+)", tree, flags=re.M), *links]:
        assert (root / name).exists(), name
    assert "figures/old-photographs.jpg" in links


def test_readme_front_matter_suits_spaces(root):
    front = re.match(r"---\n(.*?)\n---\n", (root / "README.md").read_text(), flags=re.S).group(1)
    settings = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert settings["sdk"] == "gradio" and (root / settings["app_file"]).exists()
    assert len(settings["short_description"]) <= 60
    assert re.fullmatch(r'"3\.\d+"', settings["python_version"])


def test_requirements_cover_what_the_library_needs(root):
    names = lambda lines: {re.match(r"[\w-]+", line).group().replace("-", "_").lower() for line in lines}  # noqa: E731
    required = names(line for line in (root / "requirements.txt").read_text().splitlines() if line)
    asked = {"gradio", "torch", "huggingface_hub", "safetensors", "accelerate", "opencv_python", "numpy", "pytest"}
    assert required == asked | {"av"}  # films: OpenCV can neither write H.264 nor keep the sound
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) - required <= {"pillow", "tqdm"}  # gradio brings the one, huggingface_hub the other


def test_every_picture_has_a_licence_and_an_author(root):
    import csv

    for folder in (root / "examples", root / "tests" / "photos"):
        rows = {row["file"]: row for row in csv.DictReader((folder / "SOURCES.csv").open())}
        assert set(rows) == {p.name for p in folder.glob("*.jpg")}
        assert all(row["licence"] and row["author"] for row in rows.values())
