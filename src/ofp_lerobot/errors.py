"""What the user can put right."""


class UserError(Exception):
    """Ends a command with one line and exit code 2, without a traceback."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a setting is none of its values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def within(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError where a setting is out of its range."""
    if not low <= value <= high:
        raise ValueError(
            f"{name} must be {f'in [{low}, {high}]' if high < float('inf') else f'at least {low}'}, got {value}"
        )
