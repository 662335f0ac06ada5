"""A user's mistake costs one sentence, not a traceback.

Raise `UserError("what is wrong; what to do")` anywhere. The scripts wrap their `main` in `exit_on_user_error`, which
prints the sentence and leaves with exit code 2. Everything else that goes wrong is a defect and keeps its traceback.
"""

import argparse
import difflib
import functools
import os
import sys
import time
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: the message is one sentence saying what is wrong and what to do."""

    said_by_rank_0 = None  # of several processes: True, False, or None where they have not asked one another


def nearest(name, candidates):
    """The candidate closest in spelling to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in candidates], n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name, candidates):
    """'; did you mean 'rmsnorm'?' or an empty string, to append to an error sentence."""
    match = nearest(name, candidates)
    return f"; did you mean '{match}'?" if match else ""


class Parser(argparse.ArgumentParser):
    """Argparse whose mistakes are one sentence, like everywhere else in this project."""

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ")
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        hint = did_you_mean(unknown.split()[0].split("=")[0], flags) if unknown != message else ""
        raise UserError(f"{message}{hint or '; see --help'}")


def paths_given(arguments, about, what, usage):
    """The paths that a script was given which takes nothing else; none where it was asked for help, which is printed.

    Args:
        about: the script's docstring.  what: the paths, in a word or two.  usage: a command that is right.

    Raises:
        UserError: no path, or a flag.
    """
    if "--help" in arguments or "-h" in arguments:
        print(about.strip())
        return []
    if not arguments:
        raise UserError(f"no {what} is given: {usage}")
    for flag in arguments:
        if flag.startswith("-"):
            raise UserError(f"{flag} is no {what}; see --help")
    return list(dict.fromkeys(map(Path, arguments)))


SECONDS_FOR_RANK_0 = 10


def _say(error):
    """Print the sentence, on one rank where all of a job have found the same."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and error.said_by_rank_0 is None:
        time.sleep(SECONDS_FOR_RANK_0)  # torchrun ends this process when rank 0 has said it
    if not error.said_by_rank_0:
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)


def exit_on_user_error(main):
    """Decorate a script's main: a UserError becomes `error: ...` on stderr and exit code 2, Ctrl-C one word and 130."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a console that lacks a character shows another, and goes on
        try:
            return main(*args, **kwargs)
        except UserError as error:
            _say(error)
            sys.exit(2)
        except BrokenPipeError:  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapper
