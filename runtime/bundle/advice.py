"""What a message advises: the command, the packages and the page that its reader has.

A checkout has scripts and `docs/`. An installed package has the command `rfsq`. A copied folder `runtime/` has scripts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple


class Command(NamedTuple):
    """One command.

    script: what starts it in a checkout; module: where its `main` is, below `rfsq`; extras: what it cannot do without.
    """

    script: str
    module: str
    summary: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "build": Command(
        "export/build_engine.py",
        "export.build_engine",
        "build a validated bundle from a checkpoint, or add engines for this machine",
        ("export",),
    ),
    "selftest": Command(
        "runtime/selftest.py",
        "runtime.qualification.selftest",
        "does a bundle give the reference's answers on this machine?",
    ),
    "inspect": Command(
        "runtime/inspect_bundle.py", "runtime.qualification.inspection", "what is in a bundle, and what was proven"
    ),
    "bench": Command(
        "runtime/bench.py",
        "runtime.benchmark.command",
        "how fast and how steady are a bundle's backends on this machine?",
    ),
    "compat": Command("runtime/compat.py", "runtime.qualification.compat", "can one bundle stand in for another?"),
    "explain": Command(
        "runtime/explain_tokens.py",
        "runtime.explain.command",
        "a page that shows what each further token adds, on your own episodes",
    ),
    "tokenize": Command(
        "runtime/tokenize_dataset.py",
        "runtime.datasets.tokenize",
        "encode a dataset of demonstrations, or decode one of tokens",
    ),
    "replay": Command(
        "runtime/replay_flight.py", "runtime.qualification.replay_flight", "decide every tick of a flight record again"
    ),
    "calibrate": Command(
        "calibration/fit.py", "calibration.fit", "fit a checkpoint, or chunk tokens, to demonstrations", ("export",)
    ),
    "train": Command("rfsq_ref/train.py", "rfsq_ref.train", "train a tokenizer on demonstrations", ("export",)),
    "compare": Command(
        "rfsq_ref/compare.py",
        "evidence.compare_command",
        "train per-step tokens, and compare them with peers at equal bits; chunk tokens: rfsq.evidence.compare_chunks",
        ("export", "evidence"),
    ),
    "rollout": Command(
        "rfsq_ref/rollout.py",
        "evidence.rollout_command",
        "drive simulated robots through tokens",
        ("export", "evidence", "sim"),
    ),
}
#: What each extra of `pyproject.toml` brings for people to use; "" is the core.
EXTRAS = {
    "": ("numpy", "onnxruntime"),
    "export": ("torch", "onnx", "polygraphy", "safetensors", "h5py", "pyarrow", "tqdm"),
    "evidence": ("matplotlib", "scipy", "tokenizers", "vector-quantize-pytorch"),
    "torch": ("torch",),
    "datasets": ("pyarrow", "h5py"),
    "ray": ("ray[data]", "pyarrow", "h5py"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
    "gpu": ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc"),
    "sim": ("robosuite", "mujoco"),
}
_NAME = "rfsq-deploy"
#: Where a copied folder's reader gets the package from: it is on no index.
_SOURCES = "pip install its checkout or its wheel"


@functools.cache
def layout() -> Literal["checkout", "installed", "copied"]:
    """Where this code stands: in a checkout, in an installed package, or in a copied folder `runtime/`.

    >>> layout() in ("checkout", "installed", "copied")
    True
    """
    home = Path(__file__).resolve().parents[2]
    if (home / "pyproject.toml").is_file() and (home / COMMANDS["build"].script).is_file():
        return "checkout"
    return "installed" if __name__.startswith("rfsq.") else "copied"


def command(name: str, arguments: str = "") -> str:
    """What the reader types to start a command; name: of COMMANDS, or a script that is none of them.

    >>> command("selftest", "build/bundle").split()[-1]
    'build/bundle'
    """
    script = COMMANDS[name].script if name in COMMANDS else name
    has_script = layout() == "checkout" or (layout() == "copied" and script.startswith("runtime/"))
    module = script.removesuffix(".py").replace("/", ".")
    installed = f"rfsq {name}" if name in COMMANDS else f"python -m rfsq.{module}"
    # Files of a package inside runtime/ import relatively, and are started as modules.
    here = f"python -m {module}" if script.count("/") > 1 else f"python {script}"
    typed = " ".join([here if has_script else installed, *filter(None, [arguments])])
    return typed if has_script or layout() == "installed" else f"{typed} (of {_NAME}: {_SOURCES})"


def quoted(name: str, arguments: str = "") -> str:
    """The same in backticks, for the middle of a sentence.

    >>> quoted("selftest").count("`")
    2
    """
    typed, *note = command(name, arguments).partition(" (of ")
    return f"`{typed}`{''.join(note)}"


def install(*extras: str) -> str:
    """What the reader types to install extras of this project, "" for its core.

    >>> install("gpu").startswith("pip install ")
    True
    """
    if layout() == "copied":
        return f"pip install {' '.join(dict.fromkeys(package for extra in extras for package in EXTRAS[extra]))}"
    wanted = f"[{','.join(extras)}]" if any(extras) else ""
    # Without `--editable`, a copy would take the place of the checkout that is worked on.
    what = f"--editable '.{wanted}'" if layout() == "checkout" else f"'{_NAME}{wanted}'"
    if "sim" in extras:
        # The simulator's numpy is another than the one in `constraints.txt`.
        return f"pip install {what} in an environment of its own ({page('training')})"
    return f"pip install {'--constraint constraints.txt ' if layout() == 'checkout' else ''}{what}"


def install_package(module: str, started: str = "") -> str:
    """What the reader types to install what brings a module; empty for a module of another project.

    started: the module of the command that needs it, of which all extras are named at once.

    >>> install_package("no_such_module")
    ''
    """
    package = module.replace("_", "-")
    offering = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not offering:
        return ""
    if layout() == "copied":
        return f"pip install {package}"
    needed = next((entry.extras for entry in COMMANDS.values() if started.endswith(f".{entry.module}")), ())
    if {*offering} & {*needed}:
        return install(*needed)
    extra = min(offering, key=lambda extra: len(EXTRAS[extra]))
    return install("export", extra) if extra == "evidence" else install(extra)


def page(name: str) -> str:
    """Where the reader finds a page of the documentation.

    >>> page("integration").startswith("docs/integration.md")
    True
    """
    return f"docs/{name}.md" + ("" if layout() == "checkout" else f" in the sources of {_NAME}")
