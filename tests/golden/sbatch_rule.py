"""What sbatch 22.05 reads in a job script, by its own rule: an independent check of `lhcp.launch.script.quote`.

Quotes, ' or ", toggle; a backslash escapes the next character everywhere, in both kinds of quotes too; an unquoted #
ends the line, and unquoted white space an argument. Options end at the first command.
"""

from __future__ import annotations

BACKSLASH = "\\"


def sbatch_arguments(line: str) -> list[str]:
    """The arguments behind #SBATCH in one line."""
    arguments: list[str] = []
    current, open_quote, begun, escaped = "", "", False, False
    for character in line:
        if escaped:
            current, begun, escaped = current + character, True, False
        elif character == BACKSLASH:
            escaped = True
        elif character == open_quote:
            open_quote = ""
        elif open_quote:
            current += character
        elif character in "'\"":
            open_quote, begun = character, True
        elif character == "#":
            break
        elif character in " \t\v\f":
            arguments += [current] * begun
            current, begun = "", False
        else:
            current, begun = current + character, True
    assert not open_quote, f"an open quote in {line!r}"
    return arguments + [current] * begun


def sbatch_options(text: str) -> dict[str, str | None]:
    """The options that a script gives, by name; None: a flag."""
    words: list[str] = []
    for line in text.split("\n"):
        if line.startswith("#SBATCH"):
            words += sbatch_arguments(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    assert all(word.startswith("--") for word in words)
    pairs = [word.removeprefix("--").partition("=") for word in words]
    options = {name: value if equals else None for name, equals, value in pairs}
    assert len(options) == len(pairs), "an option is given twice"
    return options
