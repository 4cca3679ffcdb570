"""lm-eval's own command line with this package's model: ``python -m grace_opt.evaluate.harness --model grace_opt ...``.

For releases of lm-eval that look for no entry points. Exits with 2 and a sentence for bad input.
"""

from __future__ import annotations

import sys

from grace_opt.errors import InputError


def main() -> int:
    """Run lm-eval's command line on this process's arguments."""
    try:
        import lm_eval.__main__ as theirs
    except ImportError:
        return _refused("lm-eval is missing; pip install 'grace-opt[lm-eval]'")
    import grace_opt.evaluate.harness.model  # noqa: F401  (registers the model)

    try:
        theirs.cli_evaluate()
    except InputError as error:
        return _refused(str(error))
    return 0


def _refused(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
