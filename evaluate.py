"""Ask the checkpoints of finished runs to go on from short prompts, and score what they write.

    python evaluate.py                                                       # the latest checkpoint of every run
    python evaluate.py --run_names gpt2 'llama*' --checkpoint_step 4000
    python evaluate.py --prompts eval/prompts_code.json --all_checkpoints --out_dir comparisons/eval_code
    python evaluate.py --at_tokens 1M,10M --temperature 0.8 --num_samples 5  # runs at equal tokens; sampled
    python evaluate.py --loss --out_dir comparisons/loss                     # where the validation loss comes from
    python evaluate.py --lm_eval=hellaswag,piqa                              # EleutherAI's harness, on any run
    python evaluate.py --probes induction mqar+n_pairs=8                     # small tasks with a known answer

It reads run folders as train.py leaves them; only --loss needs their dataset too. It leaves behind, in a folder of its
own that is never written over:

    eval_results.csv          a row for each run, checkpoint and prompt: what was written, and what was likely
    summary_table.csv, .md    a row for each run and checkpoint
    category_breakdown.csv    the same by category of prompts
    difficulty_breakdown.csv  the same by difficulty
    breakdown.png             both of these drawn, a line for each run and checkpoint
    loss_breakdown.csv        of --loss, in place of the CSV files above: context, position, recall, frequency
    lm_eval_results.csv       of --lm_eval, likewise: every metric of every task
    probes.csv, probe_places.csv    of --probes: accuracy, and by place in the window

and a line in each run's evals.jsonl, from which compare_architectures.py shows the score beside the loss.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import configurator
import training_checkpoint as checkpoint
from comparison_folders import fresh_folder, token_count
from comparison_groups import draw_groups
from comparison_runs import all_run_folders, named_folders
from eval_lm_harness import HarnessTask
from eval_probing import read_probe
from eval_prompts import Decoding, load_prompts
from eval_tasks import LossTask, ProbeTask, PromptTask
from model_builder import ConfigurableGPT, on_meta
from training_place import place_of_reader
from training_report import human_count, human_seconds, printable
from user_errors import Parser, UserError, exit_on_user_error

EVALS_FORMAT = 1  # of a line of evals.jsonl
SAME_TOKENS = 0.01  # checkpoints within this share of a token count are at it, as is the first step to reach it


@dataclass(frozen=True)
class Target:
    """A checkpoint of a run that is to be evaluated."""

    run: Path
    folder: Path
    step: int
    tokens: int  # processed
    scheduled: int  # the token count that it was the first step to reach; runs of unequal batch share it


# ---- what is asked for -----------------------------------------------------------------------------------------------


def parse(arguments):
    description, _, _ = __doc__.partition("\n\nIt reads")
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--runs_dir", default="runs", metavar="DIR", help="the folder that holds run folders (runs)")
    add("--run_names", nargs="+", default=[], metavar="RUN", help="names, globs or paths; all runs by default")
    add("--prompts", default="eval/prompts_tinystories.json", metavar="FILE", help="prompt file (TinyStories)")
    add(
        "--out_dir", default="comparisons/eval_harness", metavar="DIR", help="where files go (comparisons/eval_harness)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint_step", type=int, metavar="STEP", help="which checkpoint; the latest by default")
    which.add_argument("--checkpoint", metavar="NAME", help="the same by its folder's name, such as checkpoint-5000")
    which.add_argument("--at_tokens", metavar="N,N", help="the checkpoints at these token counts, such as 1M,10M")
    which.add_argument("--all_checkpoints", action="store_true", help="every checkpoint")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token each time")
    add("--top_k", type=int, help="draw from the likeliest k tokens alone")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--num_samples", type=int, default=1, help="texts for each prompt, at a temperature above 0 (1)")
    add("--max_new_bytes", type=int, default=64, help="how much of what is written counts (64)")
    add("--seed", type=int, default=1337)
    add("--loss", action="store_true", help="take the validation loss apart instead; this needs the dataset")
    add("--loss_tokens", type=int, default=2**17, metavar="N", help="validation tokens that --loss reads (131072)")
    add("--lm_eval", metavar="TASK,TASK", help="ask these tasks of EleutherAI's harness (pip install lm_eval)")
    add("--lm_eval_tasks", metavar="DIR", help="a folder of tasks of your own for it, as YAML files")
    add("--lm_eval_shots", type=int, metavar="N", help="examples before each question; each task's own by default")
    add("--lm_eval_limit", type=int, metavar="N", help="only the first questions of each task, to try it out")
    add("--probes", nargs="+", metavar="PROBE", help="ask probes instead, such as induction mqar+n_pairs=8")
    add("--probe_examples", type=int, default=1024, metavar="N", help="examples of each probe (1024)")
    add("--no_plots", action="store_true", help="leave the figure out")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(arguments)
    check(args)
    return args


def check(args):
    least = {"checkpoint_step": 0, "temperature": 0, "top_k": 1, "num_samples": 1, "max_new_bytes": 1, "seed": 0,
             "loss_tokens": 1, "lm_eval_shots": 0, "lm_eval_limit": 1, "probe_examples": 1}  # fmt: skip
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < float("inf"):
            raise UserError(f"--{name}={value} must be at least {bound}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must lie in (0, 1]")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(
            f"--num_samples={args.num_samples} with --temperature=0 would be one text many times; use --temperature=0.8"
        )
    names = [name.strip() for name in (args.lm_eval or "").split(",") if name.strip()]
    if args.lm_eval is not None and not names:
        raise UserError(f"--lm_eval={args.lm_eval} names no task; such as --lm_eval=hellaswag,piqa")
    args.lm_eval = list(dict.fromkeys(names))
    asked = [f"--{name}" for name in ("loss", "probes", "lm_eval") if getattr(args, name)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different evaluations; ask for one at a time")
    if not args.lm_eval:
        for name in ("lm_eval_tasks", "lm_eval_shots", "lm_eval_limit"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}={getattr(args, name)} does nothing without --lm_eval=TASK")
    if args.checkpoint is not None:
        found = re.fullmatch(r"checkpoint-(\d+)", Path(args.checkpoint).name)
        if not found:
            raise UserError(f"--checkpoint={args.checkpoint} must be the name of a folder, such as checkpoint-5000")
        args.checkpoint_step = int(found[1])
    counts = [text.strip() for text in (args.at_tokens or "").split(",") if text.strip()]
    if args.at_tokens is not None and not counts:
        raise UserError(f"--at_tokens={args.at_tokens} names no token count; such as --at_tokens=1M,10M")
    args.at_tokens = [token_count(text) for text in counts]


def find_targets(args, task):
    """([Target], problems): the checkpoints asked for, and a line for each run that was left out.

    A run that was named has to be fit for the task; where all runs are taken, those that are not cost a line each.
    Nothing is asked before all are known to be fit.

    Raises:
        UserError: no run that is fit, or one that was named is not.
    """
    folders = named_folders(Path(args.runs_dir), args.run_names) or all_run_folders(Path(args.runs_dir))
    if not folders:
        raise UserError(f"no runs found in {args.runs_dir}; train one: python train.py")
    targets, problems = [], []
    for folder in folders:
        found, reason = targets_or_reason(folder, args, task)
        if reason and args.run_names:
            raise UserError(f"run '{folder.name}': {reason}")
        targets += found
        problems += [f"{folder.name} was left out: {reason}"] if reason else []
    if not targets:
        raise UserError(all_left_out(problems))
    return targets, problems + unshared(targets)


def all_left_out(problems):
    return problems[0] + (f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else "")


def targets_or_reason(folder, args, task):
    """([Target], ''), or ([], why a run cannot be evaluated)."""
    try:
        return targets_of(folder, args, task), ""
    except UserError as error:
        return [], str(error)


def targets_of(folder, args, task):
    """[Target] of one run.

    Raises:
        UserError: the run cannot be asked, or has no such checkpoint.
    """
    settings = configurator.load_run(folder)
    if not settings.model.causal:
        raise UserError(
            f"it has causal=False and objective='{settings.train.objective}': it fills gaps, and only models that "
            "read from left to right are asked"
        )
    found = checkpoint.list_checkpoints(folder)
    if not found:
        raise UserError("it has no checkpoint yet")
    if args.checkpoint_step not in (None, *dict(found)):
        steps = ", ".join(str(step) for step, _ in found)
        raise UserError(f"it has no checkpoint at step {args.checkpoint_step}, only at {steps}")
    with on_meta():
        model = ConfigurableGPT(settings.model)
    task.check(model, task.material(folder, settings))
    found = [read_target(folder, step, path) for step, path in found]
    if args.at_tokens:
        return list(dict.fromkeys(at_count(found, count) for count in args.at_tokens))
    if args.all_checkpoints:
        return found
    return [target for target in found if target.step == args.checkpoint_step] or found[-1:]


def read_target(run, step, folder):
    try:
        tokens = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["token_metrics"]
        processed = int(tokens["total_tokens_processed"])
        return Target(run, folder, step, processed, int(tokens.get("estimated_tokens_at_step", processed)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'metadata.json'} does not say how many tokens the checkpoint has seen") from None


def at_count(found, count):
    """The checkpoint at a token count: scheduled for it, or within 1% of it."""
    nearest = min(found, key=lambda each: min(abs(each.tokens - count), abs(each.scheduled - count)))
    if count == nearest.scheduled or abs(nearest.tokens - count) <= SAME_TOKENS * count:
        return nearest
    there = ", ".join(f"{each.tokens:,}" for each in found)
    raise UserError(
        f"it has no checkpoint at {count:,} tokens, only at {there}; "
        "train with --checkpoint_tokens to save at the counts that you want"
    )


def unshared(targets):
    """A line where some run lacks a token count at which others are evaluated."""
    runs = dict.fromkeys(target.run for target in targets)
    counts = {count: {target.run for target in targets if target.scheduled == count}
              for count in sorted({target.scheduled for target in targets})}  # fmt: skip
    odd = [f"{count:,}" for count, having in counts.items() if len(having) < len(runs)]
    if not odd:
        return []
    some = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
    return [f"not all runs are evaluated at these token counts: {some}; read scores at equal tokens only"]


# ---- asking ----------------------------------------------------------------------------------------------------------


@exit_on_user_error
def main(arguments):
    args = parse(arguments)
    task = task_of(args)
    targets, problems = find_targets(args, task)
    place_of_reader(configurator.load_run(targets[0].run).train, args.device)  # or a sentence before anything is begun
    folder = fresh_folder(args.out_dir)
    evaluated, told = ask_all(targets, task, args.device)
    problems += told
    places = [(place_of(target), results) for target, results in evaluated]
    files = ["summary_table.md", *task.write(places, folder)]
    if not args.no_plots:
        labels = {f"{place['run']} {place['checkpoint']}": task.panels(results) for place, results in places}
        draw_groups(labels, task.panels_of, folder / "breakdown.png")
        files.append("breakdown.png")
    lines = [task.heading(), "", *table_lines(evaluated, task), "", *[f"- {line}" for line in dict.fromkeys(problems)]]
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "summary_table.md").write_text(f"# {task.title}\n\n{text}", encoding="utf-8", newline="\n")
    print(
        f"\n{printable(text)}\nWrote {', '.join(files)} to {folder.as_posix()}/, and a line to each run's evals.jsonl"
    )


def ask_all(targets, task, device):
    """([(Target, results)], lines to be told), with a line in evals.jsonl for each that was scored.

    What only shows when a checkpoint is asked, such as weights that cannot be read, leaves it out with a line, so that
    it does not cost what the others found.

    Raises:
        UserError: none could be scored.
    """
    progress, evaluated, failed, notes = Progress(len(targets)), [], [], []
    for target in targets:
        progress.begin(f"{target.run.name} {target.folder.name}")
        try:
            results = evaluate(target, task, device, progress)
        except UserError as error:
            failed.append(f"{target.run.name} {target.folder.name} was left out: {error}")
            continue
        append_line(target.run / "evals.jsonl", line_of(target, task.record(results)))
        evaluated.append((target, results))
        notes += [f"{target.run.name}: {note}" for note in task.notes(results)]
    progress.end()
    if not evaluated:
        raise UserError(all_left_out(failed))
    return evaluated, failed + notes


def task_of(args):
    if args.probes:
        return ProbeTask([read_probe(text) for text in args.probes], args.probe_examples)
    if args.loss:
        return LossTask(args.loss_tokens)
    if args.lm_eval:
        return HarnessTask(args.lm_eval, args.lm_eval_tasks, args.lm_eval_shots, args.lm_eval_limit, args.seed)
    decoding = Decoding(args.temperature, args.top_k, args.top_p, args.num_samples, args.max_new_bytes, args.seed)
    return PromptTask(load_prompts(args.prompts), decoding)


def evaluate(target, task, device, progress):
    """What the task found of one checkpoint, loaded from its run's folder."""
    settings = configurator.load_run(target.run)
    checkpoint.read_metadata(target.folder)
    place = place_of_reader(settings.train, device)
    material = task.material(target.run, settings)
    model = ConfigurableGPT(settings.model)
    checkpoint.load_model(model, target.folder)
    model.to(place.device).eval()
    with place.autocast():
        return task.ask(model, material, progress.show)


def line_of(target, record):
    """The line of evals.jsonl."""
    return {"format": EVALS_FORMAT, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **place_of(target), **record}  # fmt: skip


def place_of(target):
    return {"run": target.run.name, "checkpoint": target.folder.name, "step": target.step,
            "tokens_processed": target.tokens, "tokens_scheduled": target.scheduled}  # fmt: skip


def table_lines(evaluated, task):
    """The table of summary_table.md, which is also the terminal's: columns are padded."""
    rows = [["run", "step", "tokens", *task.columns]]
    for target, results in evaluated:
        rows.append([target.run.name, f"{target.step}", human_count(target.tokens), *task.cells(results)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(text.ljust(n) for text, n in zip(row, widths, strict=True))} |" for row in rows]


def append_line(path, record):
    """Append one line of JSON, after a line break where the last writer was cut off."""
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record, allow_nan=False).encode("utf-8") + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


class Progress:
    """One line that says where it is and how long the rest takes; a line for each checkpoint in a file or a pipe."""

    def __init__(self, total):
        self.total, self.done, self.name, self.t0 = total, -1, "", time.perf_counter()
        self.is_terminal = sys.stdout.isatty()

    def begin(self, name):
        self.done, self.name = self.done + 1, name
        if self.is_terminal:
            self.show(0.0)
        else:
            print(f"[{self.done + 1}/{self.total}] {name}", flush=True)

    def show(self, share):
        """Share of the checkpoint's prompts that is done."""
        if not self.is_terminal:
            return
        whole = (self.done + share) / self.total
        left = (time.perf_counter() - self.t0) * (1 - whole) / whole if whole else None
        eta = "" if left is None else f"  {human_seconds(left)} left"
        print(f"\r\x1b[2K[{self.done + 1}/{self.total}] {self.name}  {share:.0%}{eta}"[:150], end="", flush=True)

    def end(self):
        if self.is_terminal:
            print("\r\x1b[2K", end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
