"""`python -m dgsnet`, the same as the command `dgsnet`."""

from dgsnet.cli import main

if __name__ == "__main__":
    main()
