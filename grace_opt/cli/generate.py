"""grace-opt generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from grace_opt.cli.config import own_options
from grace_opt.cli.options import ModelArgument, ModelOptions, Talk, option
from grace_opt.cli.output import Format, print_records
from grace_opt.cli.provenance import explain
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask
    from grace_opt.compression.method import Method
    from grace_opt.heads import Kind


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
    method_option: Annotated[
        list[str] | None, option("--method-option", help="OPTION=VALUE, an option of the method; repeatable.")
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
    generated: Annotated[
        str | None,
        option(
            "--generated",
            help="keep generated tokens whole, or prune them as they leave the recent window; as the method or mask "
            "says if left out.",
        ),
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
    from grace_opt.models.texts import read_text
    from grace_opt.runtime.generate import check_lengths
    from grace_opt.runtime.generate import generate as run

    check_lengths(max_new_tokens, num_beams)
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one of them")
    kept = cast("Literal['keep', 'prune'] | None", generated)
    chosen = _chosen(
        mask, method, method_option or [], ratio, value_ratio, {"key": key_bits, "value": value_bits}, kept
    )
    if prompt is None:
        prompt = read_text(prompt_file or "-")
    loaded, tokenizer = loading.load(model, talk.quiet)
    from grace_opt import runtime
    from grace_opt.compression.mask import KVMask

    past = None
    if isinstance(chosen, KVMask):
        past = runtime.cache(chosen, loaded, key_bits=key_bits, value_bits=value_bits, generated=kept)
    elif chosen is not None:
        past = runtime.online_cache(
            loaded,
            chosen,
            ratio=ratio,
            value_ratio=value_ratio,
            key_bits=key_bits,
            value_bits=value_bits,
            generated=kept,
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
    if record["pays_from"] is not None and record["prompt_tokens"] < record["pays_from"]:
        talk.say(f"this cache takes fewer bytes than a full one for prompts of {record['pays_from']} tokens or more")


def _chosen(
    mask: Path | None,
    method: str | None,
    options: list[str],
    ratio: float,
    value_ratio: float,
    given: dict[Kind, int | None],
    generated: Literal["keep", "prune"] | None,
) -> KVMask | Method | None:
    """What the cache is to do: a mask, a method, or nothing. Raises InputError for what no model could run."""
    from grace_opt.compression.apply import online
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.mask_file import load_mask
    from grace_opt.compression.method import method as named

    if mask is not None and method is not None:
        raise InputError("--mask and --method exclude each other; give one of them")
    if options and method is None:
        raise InputError("--method-option goes with --method")
    if mask is None and method is None:
        if any(given.values()) or generated is not None:
            raise InputError(
                "--key-bits, --value-bits and --generated change what one says; give --mask or --method too"
            )
        return None
    made: KVMask | Method
    if mask is not None:
        made = load_mask(mask)
        plan = made.plan
    else:
        made = named(str(method), own_options("--method-option", options, str(method)))
        plan = online(made, [0], Budget(ratio, value_ratio))
    plan.changed(generated=generated, bits={kind: bits for kind, bits in given.items() if bits is not None})
    return made
