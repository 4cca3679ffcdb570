"""``python -m grace_opt``."""

from grace_opt.cli import main

if __name__ == "__main__":
    main()
