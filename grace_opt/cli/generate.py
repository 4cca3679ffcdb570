"""grace-opt generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.options import ModelArgument, ModelOptions, Talk, option
from grace_opt.cli.output import Format, print_records
from grace_opt.cli.provenance import explain
from grace_opt.errors import InputError


def generate(
    ctx: typer.Context,
    model: ModelArgument,
    *,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Mask folder, from grace-opt solve; the plain cache if left out.")
    ] = None,
    method: Annotated[
        str | None, option("--method", help="In place of a mask: choose the channels from the prompt by this method.")
    ] = None,
    ratio: Annotated[float, option("--ratio", help="With --method: fraction of the key channels to prune.")] = 0.5,
    value_ratio: Annotated[
        float, option("--value-ratio", help="With --method: fraction of the value channels to prune.")
    ] = 0.0,
    key_bits: Annotated[
        int | None, option("--key-bits", help="Hold old keys as integers of 2, 3, 4 or 8 bits.")
    ] = None,
    value_bits: Annotated[
        int | None, option("--value-bits", help="Hold old values as integers of 2, 3, 4 or 8 bits.")
    ] = None,
    prompt: Annotated[
        str | None, option("--prompt", help="The prompt; standard input if it and --prompt-file are left out.")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option("--prompt-file", help="UTF-8 file with the prompt, or -.")] = None,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="How many tokens to generate at most.")] = 64,
    num_beams: Annotated[int, option("--num-beams", help="Beams; 1 is greedy decoding.")] = 1,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Continue a prompt with a channel-pruned cache."""
    explain(ctx, talk.verbose)
    from grace_opt.compression.mask_file import load_mask
    from grace_opt.models.texts import read_text

    if mask is not None and method is not None:
        raise InputError("--mask and --method exclude each other; give one of them")
    if mask is None and method is None and (key_bits or value_bits):
        raise InputError("integers hold the channels that a mask or a method keeps; give --mask or --method too")
    if prompt is None:
        prompt = read_text(prompt_file or "-")
    elif prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one of them")
    loaded_mask = None if mask is None else load_mask(mask)
    loaded, tokenizer = loading.load(model, talk.quiet)
    from grace_opt import runtime
    from grace_opt.runtime.generate import generate as run

    past = None
    if loaded_mask is not None:
        past = runtime.cache(loaded_mask, loaded, key_bits=key_bits, value_bits=value_bits)
    elif method is not None:
        past = runtime.online_cache(
            loaded, method, ratio=ratio, value_ratio=value_ratio, key_bits=key_bits, value_bits=value_bits
        )
    record = run(loaded, tokenizer, prompt, past, max_new_tokens=max_new_tokens, num_beams=num_beams)
    if talk.format is Format.JSON:
        about = {"model": model, "mask": None if mask is None else str(mask), "method": method}
        print_records([{**about, **record}], talk.format)
        return
    print(record["text"])
    if record["unused_settings"]:
        talk.say(
            f"decoding is {'greedy' if num_beams == 1 else 'by beams'}, so these settings of the model are not used: "
            f"{', '.join(record['unused_settings'])}"
        )
    talk.say(
        f"{record['new_tokens']} tokens in {record['seconds']:.2f} s; the cache holds {record['tokens']} tokens in "
        f"{record['cache_bytes']:,} bytes, {record['cache_bytes'] / record['full_cache_bytes']:.1%} of a full one"
    )
