"""`python -m aletheia`, as torchrun starts it."""

from aletheia.cli import main

if __name__ == "__main__":
    main()
