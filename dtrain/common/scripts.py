"""What a script will need, by a look at its text: whoever is to run it can prepare that meanwhile."""

from pathlib import Path

SOURCE_MAX_BYTES = 1 << 20  # of the text that is looked at


def names_torch(script: Path) -> bool:
    """Return whether the text names torch, or dtrain, which imports it. False if it cannot be read.

    A script that imports torch by way of another module is not known by this.
    """
    try:
        with script.open("rb") as file:
            text = file.read(SOURCE_MAX_BYTES)
    except OSError:
        return False
    return b"torch" in text or b"dtrain" in text
