"""Speed, memory and decoding of architectures on this machine, side by side, beside other people's programs.

    python bench.py                                                          # the defaults' model
    python bench.py config/arch_llama.py config/arch_mamba2.py --peers=transformers
    python bench.py config/arch_gpt2.py config/arch_gpt2.py+n_layer=12+n_embd=512 --repeats=5     # two shapes
    python bench.py config/arch_mamba2.py --contexts=512,8192                # cost of a token against the context
    python bench.py config/arch_mamba2.py --decode_contexts=512,8192         # decoding and the state against it
    python bench.py --parts                                                  # single parts: linear layers, norms, ...
    python bench.py --help                                                   # every setting

Each config file is a case; `a.py+b.py+name=value` joins files and settings into one. `--name=value` is a setting of
train.py and holds for every case. A step is forward, backward, clipping and the optimizer on one micro-batch of random
tokens (vocabulary 512 where none is set). All cases and peers take turns, A B C A B C. It prints a table and adds to
benchmarks/<device>.json, where a result is replaced by a later one of the same case alone.
"""

import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import configurator
import training_place
from bench_cases import Case, Job, Workers, interleaved, kernel_check, peers_beside, prompt_length
from bench_parts import PARTS
from bench_peers import find_peers
from bench_record import aligned, number, ratio, save, slug, spread, times
from model_flops import measured_peak
from training_report import human_bytes, human_seconds
from training_run_record import git_state, versions
from user_errors import UserError, did_you_mean, exit_on_user_error

DECODE_ROUNDS = 3  # timed; one before them is not


@dataclass(frozen=True)
class BenchConfig:
    # -- the benchmark
    peers: str = ""  # others at the same shape: transformers, mambapy, nanogpt:PATH, with commas between
    repeats: int = 10  # timed training steps of each, in turn
    seconds: float | None = None  # rounds until so many seconds have passed, in place of repeats
    decode_tokens: int = 64  # tokens to generate after a short prompt; 0 leaves decoding out
    contexts: str = ""  # also the cost of a token at these contexts, such as 512,8192
    decode_contexts: str = ""  # also decoding at these contexts and the state kept there, such as 512,8192
    equal_tokens: bool = True  # contexts with as many tokens in each batch; False: with batch_size sequences in each
    parts: bool | str = False  # time single parts too, all or such as linear,rmsnorm
    out_dir: str = "benchmarks"  # where <device>.json is

    def __post_init__(self):
        for name, least in (("repeats", 1), ("decode_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError(f"seconds={self.seconds} must be above 0, or None")

    def context_lengths(self, name="contexts"):
        """[T] of `contexts` or `decode_contexts`."""
        text = getattr(self, name)
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            raise UserError(f"{name}={text!r} must be numbers of tokens with commas between, as 512,8192")
        return [int(word) for word in words]

    def decode_lengths(self):
        """[T] of `decode_contexts`, each with room for a prompt before what is decoded in all rounds."""
        lengths, decoded = self.context_lengths("decode_contexts"), (1 + DECODE_ROUNDS) * self.decode_tokens
        for T in lengths:
            if self.decode_tokens == 0:
                raise UserError(f"decode_contexts={self.decode_contexts!r} needs decode_tokens above 0")
            if not decoded < T:
                raise UserError(
                    f"decode_contexts={self.decode_contexts!r}: the last {decoded} tokens of a context are decoded "
                    f"({1 + DECODE_ROUNDS} x decode_tokens={self.decode_tokens}), and {T} leaves none to read before"
                )
        return lengths

    def part_names(self):
        """Names of `parts`, checked."""
        if isinstance(self.parts, bool):
            return [*PARTS] if self.parts else []
        names = [name.strip() for name in self.parts.split(",")]
        for name in names:
            if name not in PARTS:
                known = ", ".join(PARTS)
                raise UserError(
                    f"parts={self.parts!r}: {name!r} is no part{did_you_mean(name, PARTS)} (known: {known})"
                )
        return names


@exit_on_user_error
def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        return print(configurator.help_text(__doc__, BenchConfig))
    config, cases = read_command(arguments)
    peers, contexts, parts = find_peers(config.peers), config.context_lengths(), config.part_names()
    decode_contexts = config.decode_lengths()
    place = training_place.find_place(cases[0].settings().train)
    device_name = place.device_name()
    path = Path(config.out_dir) / f"{slug(device_name)}.json"
    story = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions(), "git": git_state(),
        "command": command_of(arguments), "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(f"{device_name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    with training_place.memory_errors():
        if not parts or cases[0].has_files:
            save(path, device_name, {"cases": measure(config, cases, peers, story)})
        if contexts:
            save(path, device_name, {"cases": measure_contexts(config, cases, contexts, story)})
        if decode_contexts:
            save(path, device_name, {"cases": measure_decode_contexts(config, cases, decode_contexts, story)})
        for name in parts:
            save(path, device_name, {"parts": measure_part(config, name, cases[0], story)})
    print(f"\nadded to {path.as_posix()}")


def command_of(arguments):
    """The command for the record; of a checkout's path the folder's name, which is all that others can use."""
    words = [re.sub(r"(nanogpt:)[^,]*[/\\]", r"\1", argument) for argument in arguments]
    return " ".join(["python", "bench.py", *map(shlex.quote, words)])


# ---- the command line ------------------------------------------------------------------------------------------------


def read_command(arguments):
    """(BenchConfig, [Case]) of a command line.

    Raises:
        UserError: an unknown setting, a wrong value, a case given twice.
    """
    own_types = dict(BenchConfig.__annotations__)
    types = {**configurator.setting_types(), **own_types}
    own, shared, files = {}, [], []
    for kind, item in configurator.split_arguments(arguments, types):
        if kind == "file":
            files.append(item)
        elif item[0] in own_types:
            own[item[0]] = configurator.parse_value(*item, types)
        else:
            configurator.parse_value(*item, types)
            shared.append(f"--{item[0]}={item[1]}")
    cases = [_case(file, shared) for file in files] or [Case("default", tuple(shared))]
    for case in cases:
        if sum(case.label == other.label for other in cases) > 1:
            raise UserError(f"case '{case.label}' is given twice")
        case.settings()  # a mistake in the last one is told before the first is measured
    return BenchConfig(**own), cases


def _case(text, shared):
    """Case of 'a.py+b.py+name=value': the files, what holds for all cases, then what this one sets."""
    words = [text] if Path(text).is_file() else text.split("+")
    files, own = [word for word in words if "=" not in word], [f"--{word}" for word in words if "=" in word]
    label = "+".join([Path(file).stem.removeprefix("arch_") for file in files] + [word[2:] for word in own])
    return Case(label, (*files, *shared, *own))


# ---- training, memory, decoding --------------------------------------------------------------------------------------


def measure(config, cases, peers, story):
    """Time every case and its peers in turn, print the table, and return {case key: record}."""
    place = training_place.find_place(cases[0].settings().train)
    if place.device.type == "cuda":
        check_kernels(cases)
    jobs = [Job(case, peer) for case in cases for peer in ["", *(peer.text for peer in peers_beside(case, peers))]]

    def ceiling():
        return measured_peak(place.device, place.precision, seconds=0.1)

    with Workers(jobs, Progress("starting")) as workers:
        rows = {(worker.job.case, worker.job.peer): worker for worker in workers}
        steps = {**{row: worker.step for row, worker in rows.items()}, "ceiling": ceiling}
        seconds = interleaved(steps, config.repeats, config.seconds, Progress("training"))
        decoding = measure_decoding(config, rows)
    peak, records, table = max(seconds["ceiling"]), {}, [TABLE_HEAD]
    for (case, peer), worker in rows.items():
        rates = [worker.about["tokens"] / second for second in seconds[case, peer]]
        record = describe(worker)
        share = worker.about["flops_per_token_training"] * spread(rates)["median"] / peak
        record["training"] = {"tokens_per_second": spread(rates), "ceiling_flops_per_second": peak,
                              "share_of_ceiling": share, **story}  # fmt: skip
        if peer:
            ours = [rows[case, ""].about["tokens"] / second for second in seconds[case, ""]]
            record["training"]["nanoarch_is_times_as_fast"] = ratio(ours, rates)
        if (case, peer) in decoding:
            record["decode"] = {"tokens_per_second": spread(decoding[case, peer]), **story}
        record["memory"] = {"peak_bytes": worker.about["peak_memory_bytes"], **story}
        records[worker.about["key"]] = record
        table.append(table_row(case, peer, record))
    model = cases[0].settings()
    shape = f"{model.train.batch_size} x {model.model.block_size} tokens"
    print(f"\ntraining steps of {shape}, {place.precision}; matrix product {peak / 1e9:,.0f} GFLOP/s\n")
    print("\n".join(aligned(table)))
    return records


def describe(worker):
    """A record of a worker, without its numbers."""
    about = {name: value for name, value in worker.about.items() if name not in ("key", "tokens", "peak_memory_bytes")}
    return about | {"arguments": list(worker.job.case.arguments)}


TABLE_HEAD = ["case", "parameters", "tokens/s", "quartiles", "of ceiling", "peak memory", "decode/s", "state",
              "nanoArch is"]  # fmt: skip


def table_row(case, peer, record):
    training, speed = record["training"], record["training"]["tokens_per_second"]
    state = record.get("state_bytes")
    return [
        f"  {record['program']}" if peer else case.label,
        f"{record['parameters']:,}",
        number(speed["median"]),
        f"{number(speed['q1'])} to {number(speed['q3'])}",
        f"{100 * training['share_of_ceiling']:.0f}%",
        human_bytes(record["memory"]["peak_bytes"]),
        number(record["decode"]["tokens_per_second"]["median"]) if "decode" in record else "-",
        human_bytes(state["bytes"]) if state else "-",
        times(training["nanoarch_is_times_as_fast"]) if peer else "",
    ]


def measure_decoding(config, rows):
    """{row: [tokens per second]} for the rows that can generate."""
    lengths = {row: decode_length(config, row[0]) for row in rows}
    functions = {row: (lambda row=row: rows[row].decode(lengths[row])) for row in rows if lengths[row]}
    if not functions:
        return {}
    interleaved(functions, 1)
    seconds = interleaved(functions, DECODE_ROUNDS, progress=Progress("decoding"))
    return {row: [lengths[row] / second for second in seconds[row]] for row in functions}


def decode_length(config, case):
    """Tokens to generate, none where a token sees the next; with the prompt no more than block_size, a peer's limit."""
    shape = case.settings().model
    return max(0, min(config.decode_tokens, shape.block_size - prompt_length(shape))) if shape.causal else 0


def check_kernels(cases):
    """Hold what kernels.choose installed to the plain path, before anything is timed."""
    for case in cases:
        chosen, difference = kernel_check(case)
        words = ", ".join(f"{part} {kernel}" for part, kernel in chosen.items())
        print(f"{case.label}: {words}; gradients within {difference:.1e} of the plain path's")


# ---- the cost of a token against the context -------------------------------------------------------------------------


def measure_contexts(config, cases, contexts, story):
    """Forward and backward at every context, in batches as equal_tokens says; {case key: record}."""
    records, table = {}, [["forward and backward, us/token", *(f"T = {T:,}" for T in contexts), "last to first"]]
    for case in cases:
        base = case.settings()
        tokens = max(base.train.batch_size * base.model.block_size, *contexts) if config.equal_tokens else None
        progress = Progress(f"{case.label} at {len(contexts)} contexts")
        with Workers([Job(case, context=T, tokens=tokens) for T in contexts]) as workers:
            functions = {worker.job.context: worker.forward_backward for worker in workers}
            seconds = interleaved(functions, config.repeats, config.seconds, progress)
        cost = {w.job.context: [s / w.about["tokens"] for s in seconds[w.job.context]] for w in workers}
        growth = ratio(cost[contexts[-1]], cost[contexts[0]])
        records[workers[0].about["key"]] = {"contexts": {
            "seconds_per_token": {str(T): spread(cost[T]) for T in contexts}, "last_to_first": growth,
            "tokens_in_a_batch": {str(w.job.context): w.about["tokens"] for w in workers}, **story,
        }}  # fmt: skip
        table.append([case.label, *(number(1e6 * spread(cost[T])["median"]) for T in contexts), times(growth)])
    print("\n" + "\n".join(aligned(table)))
    return records


def measure_decode_contexts(config, cases, contexts, story):
    """Decode the last tokens of every context, one sequence at a time; {case key: record}."""
    n, records = config.decode_tokens, {}
    table = [["decoding, tokens/s (state)", *(f"T = {T:,}" for T in contexts), "last to first"]]
    for case in [case for case in cases if case.settings().model.causal]:
        progress = Progress(f"{case.label} decoding at {len(contexts)} contexts")
        with Workers([Job(case, context=T, tokens=T, warm_up=0) for T in contexts]) as workers:
            for worker in workers:
                worker.read_prompt((1 + DECODE_ROUNDS) * n)
            functions = {worker.job.context: (lambda worker=worker: worker.decode_on(n)) for worker in workers}
            interleaved(functions, 1)
            seconds = interleaved(functions, DECODE_ROUNDS, progress=progress)
        rates = {T: [n / second for second in seconds[T]] for T in contexts}
        state = {worker.job.context: worker.about["state_bytes"]["bytes"] for worker in workers}
        change = ratio(rates[contexts[-1]], rates[contexts[0]])
        records[workers[0].about["key"]] = {"decode_contexts": {
            "tokens_per_second": {str(T): spread(rates[T]) for T in contexts}, "last_to_first": change,
            "state_bytes": {str(T): state[T] for T in contexts}, **story,
        }}  # fmt: skip
        cells = (f"{number(spread(rates[T])['median'])} ({human_bytes(state[T])})" for T in contexts)
        table.append([case.label, *cells, times(change)])
    print("\n" + "\n".join(aligned(table)))
    return records


# ---- single parts ----------------------------------------------------------------------------------------------------


def measure_part(config, name, case, story):
    """Time one part's variants in turn, print them, and return {part: record}."""
    rows = PARTS[name](case, config, Progress(name))
    variants = list(dict.fromkeys(variant for row in rows.values() for variant in row["variants"]))
    table = [[PARTS[name].__doc__.partition("\n")[0].rstrip("."), *variants, "unit"]]
    for label, row in rows.items():
        medians = [row["variants"].get(variant) for variant in variants]
        table.append([label, *("-" if m is None else number(m["median"]) for m in medians), row["unit"]])
    print("\n" + "\n".join(aligned(table)))
    return {name: {"rows": rows, **story}}


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """'training 40%, about 12s left' on the error stream, where it is a terminal on one line that goes away."""

    def __init__(self, what):
        self.what, self.t_start, self.t_shown = what, time.perf_counter(), float("-inf")

    def __call__(self, part):
        now, stream = time.perf_counter(), sys.stderr
        width = shutil.get_terminal_size().columns - 1
        if part >= 1:
            if stream.isatty():
                print("\r" + " " * width + "\r", end="", file=stream, flush=True)
            return
        left = (now - self.t_start) * (1 - part) / max(part, 1e-9)
        line = f"{self.what} {100 * part:.0f}%, about {human_seconds(left)} left"
        if stream.isatty():
            print("\r" + line[:width].ljust(width), end="", file=stream, flush=True)
        elif now - self.t_shown > 30:  # a log gets a line now and then
            print(line, file=stream, flush=True)
        else:
            return
        self.t_shown = now


if __name__ == "__main__":
    main(sys.argv[1:])
