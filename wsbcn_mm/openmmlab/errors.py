"""What other people's errors say, for messages of ours."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, ``''`` where it has none."""
    return (str(error).strip().splitlines() or [''])[0]
