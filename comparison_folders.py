"""What scripts that read runs share: where their files go, and a token count as a person writes it."""

from pathlib import Path

from user_errors import UserError


def token_count(text):
    """'100M' -> 100_000_000; k, M, B and T are thousands, millions, billions and trillions."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}.get(text[-1:].lower(), 1)
    try:
        tokens = round(float((text[:-1] if scale > 1 else text).replace("_", "")) * scale)
    except (ValueError, OverflowError):
        raise UserError(f"--at_tokens={text} must be a number of tokens, such as 100M or 5e6") from None
    if tokens < 1:
        raise UserError(f"--at_tokens={text} must be at least 1")
    return tokens


def fresh_folder(path):
    """Create `path`, or path-2, path-3, ... where it holds something already. Nothing is ever written over."""
    path = Path(path)
    for number in range(1, 10_000):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if folder.is_dir() and not any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(f"--out_dir={path} cannot be written: {error.strerror or error}") from None
    raise UserError(f"--out_dir={path} and its next 9,999 names are taken; choose another")
