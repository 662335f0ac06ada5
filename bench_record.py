"""Numbers of bench.py: medians with their spread, ratios, the table, and `benchmarks/<device>.json`.

    spread([1.0, 1.2, 1.1])                       # {'median': 1.1, 'q1': 1.05, 'q3': 1.15, 'n': 3}
    save(path, device_name, {'cases': {case: {'training': {...}}}})

A file keeps what other commands measured: a case is found by its name, and each of its sections (training, decode,
memory, contexts) is replaced alone. Every section carries its date, command, versions, git commit and threads.
"""

import json
import os
import re
from pathlib import Path

from user_errors import UserError

FORMAT = 1


# ---- statistics ------------------------------------------------------------------------------------------------------


def quantile(values, part):
    """The value below which `part` of them lie, in a straight line between neighbours."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values):
    """{'median', 'q1', 'q3', 'n'}: half of the values lie between q1 and q3."""
    return {"median": quantile(values, 0.5), "q1": quantile(values, 0.25), "q3": quantile(values, 0.75),
            "n": len(values)}  # fmt: skip


def ratio(rates, other_rates):
    """How many times `other_rates` the rates are: {'ratio' of medians, 'q1' and 'q3' of the ratios round by round}.

    Both lists come from the same rounds, so that what slowed a round down slowed both.
    """
    rounds = spread([rate / other for rate, other in zip(rates, other_rates, strict=True)])
    of_medians = quantile(rates, 0.5) / quantile(other_rates, 0.5)
    return {"ratio": of_medians, "q1": rounds["q1"], "q3": rounds["q3"], "n": rounds["n"]}


# ---- the file --------------------------------------------------------------------------------------------------------


def slug(name):
    """'NVIDIA H200' -> 'nvidia_h200'."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


def load(path, device_name):
    """What the file holds, or an empty record.

    Raises:
        UserError: a file that is no record of this device.
    """
    if not path.exists():
        return {"format": FORMAT, "device": device_name, "cases": {}, "parts": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["device"] == device_name:
            return {"cases": {}, "parts": {}, **record}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no record of '{device_name}' that can be added to; move it away, or give --out_dir")


def merged(record, new):
    """`record` with the cases and parts of `new`: sections of the same name are replaced, all else stays."""
    result = {**record}
    for kind in ("cases", "parts"):
        result[kind] = dict(record[kind])
        for name, sections in new.get(kind, {}).items():
            result[kind][name] = {**result[kind].get(name, {}), **sections}
    return result


def save(path, device_name, new):
    """Merge `new` into the file, which is never seen half written."""
    path = Path(path)
    record = merged(load(path, device_name), new)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; give another --out_dir") from None


# ---- the table -------------------------------------------------------------------------------------------------------


def aligned(rows):
    """Rows of words as lines, the first column to the left and the others to the right, under a line of dashes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return [lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])]


def number(value):
    """Three digits or more: 0.123, 12.3, 2,383."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(ratio_):
    """'1.12x (1.08 to 1.15)'."""
    return f"{ratio_['ratio']:.2f}x ({ratio_['q1']:.2f} to {ratio_['q3']:.2f})"
