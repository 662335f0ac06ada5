"""Does a text that a model wrote hold an answer? No pattern can make it take forever.

    is_match("contains", "he", "then the hen ran")     # False: inside longer words
    is_match("regex", r"f\\w+r$", "it is four")         # True; TooSlowError where a pattern backtracks without end

Python's `re` cannot be interrupted, so a pattern from a file is searched for in a process of its own, which is stopped
when it takes too long. It is started once, without a fork, and again after it was stopped.
"""

import json
import re
import subprocess
import sys
import threading

SECONDS = 5.0  # of the clock, for one pattern in one text; a sound one takes microseconds, on a busy machine more
LONG = 64  # characters of the text that a pattern is tried on before a model is asked

SEARCHING = """
import json, re, sys
print(flush=True)
for line in sys.stdin:
    pattern, text, flags = json.loads(line)
    print(int(re.search(pattern, text, flags) is not None), flush=True)
"""


class TooSlowError(Exception):
    """A regex whose search does not end."""

    def __init__(self, pattern):
        super().__init__(f"the regex {pattern!r} was not done after {SECONDS:g} s; let it match a text in one way only")


def whole_words(text):
    """A pattern for the text itself, not inside a longer word: 'he' is not found in 'the'."""
    text = text.strip()
    before, after = (r"(?<!\w)" if text[:1].isalnum() else ""), (r"(?!\w)" if text[-1:].isalnum() else "")
    return before + re.escape(text) + after


# What each kind looks for in what the model wrote, whose surrounding whitespace is cut off.
MATCHES = {
    "contains": whole_words,
    "prefix": lambda answer: r"\A" + whole_words(answer),
    "exact": lambda answer: r"\A" + re.escape(answer.strip()) + r"\s*(\n|\Z)",  # all of the first line
    "regex": lambda answer: answer,
}


def is_match(match, answer, text, case_sensitive=False):
    """Whether `text` has the answer in the way that `match` says.

    Raises:
        TooSlowError: of a regex.
    """
    pattern, flags = MATCHES[match](answer), 0 if case_sensitive else int(re.IGNORECASE)
    if match == "regex":
        return SEARCHER.search(pattern, text, flags)
    return re.search(pattern, text, flags) is not None


def trouble_with(pattern):
    """Why a regular expression does not compile, or None."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)


def tedious(text):
    """A long text on which a pattern that backtracks without end is likely to: small models repeat themselves too."""
    return (text * LONG)[:LONG] + "\n!"


class Searcher:
    """Another Python process that searches, one line of JSON for each text."""

    def __init__(self):
        self.process = None

    def search(self, pattern, text, flags):
        """Whether the pattern is found.

        Raises:
            TooSlowError: not within SECONDS.
        """
        for _ in range(2):  # again where something else ended the process
            answer, was_too_slow = self.ask(json.dumps([pattern, text, flags]))
            if answer:
                return answer == "1"
            self.stop()
            if was_too_slow:
                break
        raise TooSlowError(pattern)

    def ask(self, line):
        """(its answer or '', whether it was stopped for taking too long)."""
        process = self.process = self.process or started()
        was_too_slow = threading.Event()

        def interrupt():
            was_too_slow.set()
            process.kill()

        timer = threading.Timer(SECONDS, interrupt)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip(), was_too_slow.is_set()
        except OSError:  # it is gone
            return "", was_too_slow.is_set()
        finally:
            timer.cancel()

    def stop(self):
        process, self.process = self.process, None
        process.kill()
        process.communicate()


def started():
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", SEARCHING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, encoding="utf-8",
    )  # fmt: skip
    process.stdout.readline()  # it is ready: starting does not count
    return process


SEARCHER = Searcher()  # ends with this process, which closes its input
