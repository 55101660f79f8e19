"""The wheel works without the checkout: built, installed into an empty environment, used from an empty folder.

Shown: the wheel holds every module, engine file and run file; each `longmem-*` command starts; data is prepared, a tiny
model trained and exported by commands alone, and training goes on under DeepSpeed's launcher; nothing is taken from the
checkout. Not shown: that the dependencies the wheel names can be installed and are enough. They would take minutes and
a network, so the environment sees those of the tests, by a `.pth` file: one that names a folder does not make Python
read the `.pth` files in it, of which set-up's `longmem.pth` names the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from pipeline.config.shipped import SHIPPED
from pipeline.metrics.record import read_metrics
from tests.ranks import free_port
from tests.tiny_run import TinyRun, save_backbone

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "eval", "launch")
COMMANDS = (
    *("evaluate", "export", "generate", "import-official", "inspect-memory", "plan", "prepare-backbone"),
    *("prepare-data", "prepare-demonstrations", "status", "train"),
)
TIMEOUT_S = 240  # the first start on a machine compiles an extension of DeepSpeed
STEPS = 3


def tracked() -> list[str]:
    """What git knows of the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def clean_environment(*folders: Path) -> dict[str, str]:
    """Nothing of the checkout, nor of a launcher; programs of these folders come first."""
    ours = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, "PATH": os.pathsep.join([*map(str, folders), kept["PATH"]])}


def run(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs a command to its good end. Returns what it printed."""
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that neither old builds nor caches get into it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", str(output), str(source)], output, clean_environment())
    shutil.rmtree(source)
    (built,) = output.iterdir()
    return built


class Installed:
    """The wheel in an environment of its own, used from an empty folder.

    Args:
        prefix: The virtual environment.
        folder: Where commands run.
    """

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.prefix, self.folder = prefix, folder
        self.python = str(prefix / "bin" / "python")
        # Behind its own programs those that dependencies run, such as ninja.
        self.environment = clean_environment(prefix / "bin", Path(sys.executable).parent)
        # The same torch and DeepSpeed: what they compiled for the other tests is not compiled again.
        self.environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

    def command(self, name: str, *words: str) -> str:
        """Runs `longmem-NAME` and returns what it printed."""
        return run([str(self.prefix / "bin" / f"longmem-{name}"), *words], self.folder, self.environment)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    prefix, folder = tmp_path_factory.mktemp("venv") / "venv", tmp_path_factory.mktemp("elsewhere")
    run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], folder, clean_environment())
    found = Installed(prefix, folder)
    pip = [sys.executable, "-m", "pip", "--python", found.python, "install", "--no-index", "--no-deps", str(wheel)]
    run(pip, folder, clean_environment())
    (own,) = (prefix / "lib").glob("python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(dependencies)))
    return found


@pytest.fixture(scope="module")
def settings(installed: Installed) -> Path:
    """Of a run over a tiny backbone and a store that the command made."""
    folder = installed.folder
    save_backbone(folder / "backbone")
    (folder / "texts").mkdir()
    for number in range(6):
        text = f"The captain of ship number {number} remembered the letter and the long road over the hills. "
        (folder / "texts" / f"{number}.txt").write_text(text * 5)
    held_out = ["--validation-documents", "2", "--workers", "1"]
    installed.command("prepare-data", "texts", "--tokenizer", "backbone", "--output", "data", *held_out)
    inputs = TinyRun(folder / "backbone", folder / "data", more=folder / "none")
    return inputs.write_config(folder / "run.yaml", folder / "run", train={"steps": STEPS})


def test_the_wheel_holds_all_that_runs_and_nothing_else(wheel: Path) -> None:
    packaged = {name for name in tracked() if name.split("/")[0] in PACKAGES}
    scripts = {name for name in packaged if name.startswith("launch/") and Path(name).suffix in (".sh", ".sbatch")}
    shipped = {f"pipeline/shipped/{name}" for name in tracked() if name.split("/")[0] in ("configs", "ds_configs")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        said = message_from_bytes(archive.read(metadata))
        assert archive.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert names == (packaged - scripts) | shipped
    required = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert said.get_all("Requires-Dist") == required
    assert said["License-Expression"] == "Apache-2.0"


def test_everything_is_imported_from_the_installed_place(installed: Installed) -> None:
    code = "import json, sys, pipeline.config.shipped as shipped, eval, launch, torch\n"
    code += "files = [module.__file__ for module in (shipped, eval, launch)]\n"
    code += "print(json.dumps([files, torch.__file__, str(shipped.SHIPPED), sys.path]))"
    printed = run([installed.python, "-c", code], installed.folder, installed.environment)
    files, torch_file, shipped, paths = json.loads(printed)
    for file in (*files, shipped):
        assert Path(file).is_relative_to(installed.prefix), file
    assert not Path(torch_file).is_relative_to(installed.prefix)
    assert not [path for path in paths[1:] if (Path(path) / "pyproject.toml").exists()], paths
    assert SHIPPED == ROOT  # the tests themselves use the checkout


def test_every_command_says_its_options(installed: Installed) -> None:
    for name in COMMANDS:
        assert f"usage: longmem-{name}" in installed.command(name, "--help")
    assert {path.name for path in (installed.prefix / "bin").glob("longmem-*")} == {f"longmem-{x}" for x in COMMANDS}


def test_shipped_settings_are_found_by_name_and_a_missing_file_with_the_places(installed: Installed) -> None:
    shape = ["--shape", "gpt2-medium", "--config"]
    engine = "--backbone.deepspeed=ds_configs/backbone_zero3_inference_cpu_offload.json"
    assert "GiB" in installed.command("plan", *shape, "configs/paper.yaml", engine)
    words = [str(installed.prefix / "bin" / "longmem-plan"), *shape, "configs/none.yaml"]
    done = subprocess.run(words, cwd=installed.folder, env=installed.environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"looked in: {installed.folder} and {installed.prefix}" in done.stderr


def test_a_training_from_text_to_export(installed: Installed, settings: Path, wheel: Path) -> None:
    installed.command("train", "--config", settings.name, f"--train.stop_after_steps={STEPS - 1}")
    run_folder = installed.folder / "run"
    assert [record["step"] for record in read_metrics(run_folder)] == list(range(1, STEPS))
    versions = json.loads((run_folder / "versions.json").read_text())
    assert versions["longmem-deepspeed"] == wheel.name.split("-")[1] and "git_commit" not in versions
    assert "run" in installed.command("status", "run")
    installed.command("export", "run", "--output", "sidenet")
    assert list((installed.folder / "sidenet").glob("*.safetensors"))


def test_the_module_goes_on_under_deepspeed(installed: Installed, settings: Path) -> None:
    launcher = [installed.python, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", str(free_port()), "--module", "launch.train", "--config", settings.name]
    run(launcher, installed.folder, installed.environment)
    assert max(record["step"] for record in read_metrics(installed.folder / "run")) == STEPS
    assert "finished" in installed.command("status", "run")
