"""EleutherAI's evaluation harness (Gao et al. 2021) on a run, in this process: no export, no Hugging Face class.

    run = HarnessRun(model, tokenizer)
    run.log_probabilities([("The sky is", " blue")])      # [(nats, whether greedy decoding would write it), ...]
    results = ask_harness(run, ["hellaswag", "piqa"])     # what the harness makes of it; needs `pip install lm_eval`

`HarnessRun` knows nothing of the harness and follows what its own class for Hugging Face models does, so that a run and
its export have the same scores: prompt and continuation are encoded together and cut where the prompt's tokens end,
spaces at the end of a prompt belong to the continuation, and what does not fit loses its start.
"""

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path

import torch

from eval_tasks import percent, tokenizer_of, write_tables
from model_builder import NotFiniteError
from user_errors import UserError, did_you_mean

BATCH_TOKENS = 2**13  # that a forward pass reads, unless one sequence is longer
HEAD_TOKENS = 2**10  # whose logits are held at a time
MAX_BATCH = 32  # texts that are written side by side
MAX_NEW_TOKENS = 256  # where a task sets no bound; the harness's own
BOUNDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # its names for one, first wins
# What a task's table shows; its other metrics are in the files.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "word_perplexity", "perplexity")


class HarnessRun:
    """A run as the harness asks it: texts in, log-probabilities and texts out.

    Args:
        model: a causal ConfigurableGPT.
        tokenizer: the run's own.
        seed: of texts that a task wants sampled.
        progress: called with the share of the requests of one kind that is done.
    """

    def __init__(self, model, tokenizer, seed=1337, progress=lambda done: None):
        self.model, self.tokenizer, self.seed, self.progress = model, tokenizer, seed, progress
        self.longest = model.config.block_size  # also where a recurrent model could read more: all are asked alike

    def encode(self, text):
        return self.tokenizer.encode(text).tolist()

    @property
    def prefix(self):
        """The token that stands before a text with nothing before it."""
        if self.tokenizer.end_of_document_id is None:
            raise UserError(
                f"tokenizer='{self.tokenizer.name}' has no token that ends a document, and a task of --lm_eval asks "
                "for a text with nothing before it; ask other tasks, or train with a tokenizer that has one"
            )
        return self.tokenizer.end_of_document_id

    # -- log-probabilities

    def log_probabilities(self, pairs):
        """[(log p of the continuation in nats, whether greedy decoding writes it)] of [(context, continuation)].

        Raises:
            UserError: a continuation longer than the training context.
        """
        return self.score([self.sequence_of(*self.encode_pair(*pair), pair[1]) for pair in pairs])

    def encode_pair(self, context, continuation):
        """(ids of the context, ids of the continuation); an empty context becomes the prefix."""
        kept = context.rstrip()
        ids = self.encode(context + continuation)
        if kept:
            before = self.encode(kept)
            cut = min(len(before), max(0, len(ids) - 1))  # the last token is the continuation's, wherever it began
            return before[:cut], ids[cut:]
        return (ids[:1], ids[1:]) if ids and ids[0] == self.prefix else ([self.prefix], ids)

    def sequence_of(self, context, continuation, text):
        """(ids, how many of the last are scored): at most `longest` are read, and the start is cut off."""
        if len(continuation) > self.longest:
            raise UserError(
                f"a task of --lm_eval has the answer {text[:40]!r} of {len(continuation)} tokens, and the context is "
                f"block_size={self.longest}; ask other tasks, or train with a larger block_size"
            )
        return (context + continuation)[-(self.longest + 1) :], len(continuation)

    def rolling_log_probabilities(self, texts):
        """[log p of a whole text in nats]: each token once, in windows of the training context."""
        windows = [list(self.windows_of(self.encode(text))) for text in texts]
        scores = iter(self.score([window for row in windows for window in row]))
        return [math.fsum(next(scores)[0] for _ in row) for row in windows]

    def windows_of(self, ids):
        """(ids, how many of the last are scored) covering a text; the last window reaches back into the one before."""
        done = min(self.longest, len(ids))
        if done:
            yield [self.prefix, *ids[:done]], done
        while done < len(ids):
            end = min(done + self.longest, len(ids))
            yield ids[end - self.longest - 1 : end], end - done
            done = end

    @torch.inference_mode()
    def score(self, sequences):
        """[(nats, is_greedy)] of (ids, how many of the last are scored), in their order.

        Sequences of one length share a forward pass, so that nothing is padded.

        Raises:
            NotFiniteError: a model that diverged.
        """
        scores, by_length, done = [(0.0, True)] * len(sequences), defaultdict(list), 0
        for index, (ids, n) in enumerate(sequences):
            if n:
                by_length[len(ids)].append(index)
        for length, indices in sorted(by_length.items(), reverse=True):  # what needs the most memory comes first
            rows = max(1, BATCH_TOKENS // length)
            for start in range(0, len(indices), rows):
                batch = indices[start : start + rows]
                for index, found in zip(batch, self.score_batch([sequences[i] for i in batch]), strict=True):
                    scores[index] = found
                done += len(batch)
                self.progress(done / len(sequences))
        return scores

    def score_batch(self, batch):
        idx = torch.tensor([ids for ids, _ in batch], device=self.model.head.weight.device)  # (B, T + 1)
        lengths = [n for _, n in batch]
        hidden = self.model.hidden_states(idx[:, :-1])  # (B, T, C)
        hidden = torch.cat([row[-n:] for row, n in zip(hidden, lengths, strict=True)])
        targets = torch.cat([row[-n:] for row, n in zip(idx, lengths, strict=True)])
        nats, is_best = [], []
        for piece, wanted in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
            of_all = torch.log_softmax(self.model.logits(piece).float(), dim=-1)
            nats.append(of_all.gather(-1, wanted[:, None]).squeeze(-1).double().cpu())
            is_best.append((of_all.argmax(-1) == wanted).cpu())
        if not torch.cat(nats).isfinite().all():
            raise NotFiniteError()
        parts = zip(torch.cat(nats).split(lengths), torch.cat(is_best).split(lengths), strict=True)
        return [(part.sum().item(), bool(best.all())) for part, best in parts]

    # -- writing

    def write_until(self, requests):
        """[text written after the context, cut before the first stop] of (context, the task's generation settings)."""
        written, groups = [""] * len(requests), defaultdict(list)
        for index, (context, settings) in enumerate(requests):
            how = writing_of(settings)
            ids = self.encode(context)[-self.room_for(how["n"]) :] or [self.prefix]
            groups[len(ids), json.dumps(how, sort_keys=True)].append((index, ids, how))
        done = 0
        for rows in groups.values():
            for start in range(0, len(rows), MAX_BATCH):
                batch = rows[start : start + MAX_BATCH]
                texts = self.write([ids for _, ids, _ in batch], batch[0][2])
                for (index, _, _), text in zip(batch, texts, strict=True):
                    written[index] = text
                done += len(batch)
                self.progress(done / len(requests))
        return written

    def room_for(self, n_new):
        """Tokens of a context that are kept when `n_new` are to be written after it."""
        return self.longest - n_new if n_new < self.longest else max(1, self.longest // 2)

    def write(self, contexts, how):
        """Texts after contexts that are equally long."""
        idx = torch.tensor(contexts, device=self.model.head.weight.device)  # (B, T)
        name = f"{self.seed} {contexts}".encode()  # a stream of its own, whatever else is asked
        generator = torch.Generator(device=idx.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))

        def all_done(out):
            return all(self.shorten(row, how["until"])[1] for row in out[:, idx.size(1) :].tolist())

        out = self.model.generate(
            idx, how["n"], how["temperature"], how["top_k"], how["top_p"], generator, stop=all_done
        )
        return [self.shorten(row, how["until"])[0] for row in out[:, idx.size(1) :].tolist()]

    def shorten(self, row, stops):
        """(the text of tokens before the end of the document and before every stop, whether there was one)."""
        end = self.tokenizer.end_of_document_id
        is_ended = end in row
        text = whole = self.tokenizer.decode(row[: row.index(end)] if is_ended else row)
        for stop in stops:
            text = text.partition(stop)[0]
        return text, is_ended or text != whole


def writing_of(settings):
    """{n, until, temperature, top_k, top_p} of a task's generation settings.

    Raises:
        UserError: a setting that is not here, such as num_beams=4.
    """
    given = dict(settings)
    bounds = [given.pop(name, None) for name in BOUNDS]
    until = given.pop("until", None) or []
    temperature, sampled = float(given.pop("temperature", None) or 0.0), given.pop("do_sample", None)
    if sampled is False:
        temperature = 0.0
    elif sampled and not temperature:
        temperature = 1.0
    how = {
        "n": int(next((bound for bound in bounds if bound is not None), MAX_NEW_TOKENS)),
        "until": [stop for stop in ([until] if isinstance(until, str) else until) if stop],
        "temperature": temperature,
        "top_k": given.pop("top_k", None) or None,
        "top_p": given.pop("top_p", None),
    }
    idle = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}  # at these they ask for nothing
    for name, value in given.items():
        if name not in idle or value != idle[name]:
            raise UserError(f"a task of --lm_eval wants texts written with {name}={value!r}, which is not here")
    return how


# ---- the harness -----------------------------------------------------------------------------------------------------


def harness():
    """The package lm_eval.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"--lm_eval needs EleutherAI's harness ({error}): pip install lm_eval") from None
    return lm_eval


def task_manager(names, folder=None):
    """The harness's index of tasks, once the tasks asked for are found and their data can be read.

    Args:
        folder: of tasks that are not the harness's own, as YAML files.

    Raises:
        UserError: a task that is not there, or whose data is not.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--lm_eval_tasks={folder} is not a folder; it must hold the YAML files of your tasks")
    manager = harness().tasks.TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--lm_eval={name} is no task of the harness{did_you_mean(name, manager.all_tasks)}")
        try:
            manager.load([name])
        except Exception as error:  # no network, a moved data set, a broken YAML: each in a class of its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--lm_eval={name} could not be loaded ({type(error).__name__}: {reason})") from error
    return manager


def ask_harness(run, names, manager=None, n_shot=None, limit=None):
    """The harness's results of the tasks `names` for a HarnessRun: a dict with results, n-shot, versions and more.

    Args:
        n_shot: examples before each question; None is each task's own number.
        limit: questions of each task; None asks all.
    """
    package = harness()
    from lm_eval.api.model import LM

    class Asked(LM):
        """What the harness calls; it passes lists of requests, each with its arguments."""

        def loglikelihood(self, requests):
            return run.log_probabilities([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return run.rolling_log_probabilities([text for (text,) in (request.args for request in requests)])

        def generate_until(self, requests):
            return run.write_until([request.args for request in requests])

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), run.seed)
    return package.simple_evaluate(Asked(), tasks=list(names), num_fewshot=n_shot, limit=limit, log_samples=False,
                                   task_manager=manager or task_manager(names), **seeds)  # fmt: skip


def tables_of(results):
    """{task or group: {group, version, n_shot, questions, main, metrics: {name: {value, stderr, better}}}} of them.

    group: the group that a task was asked as part of, or None. main: the metric that tables show. Numbers that are
    missing or not finite are None. A filter that a task names is part of the metric's name.
    """
    tables, parts = {}, results.get("group_subtasks") or {}
    groups = {name: group for group, names in parts.items() for name in names if group in results["results"]}
    for name, row in results["results"].items():
        better = results.get("higher_is_better", {}).get(name) or {}
        metrics = {}
        for key, value in row.items():
            metric, _, how = key.partition(",")
            if how and not metric.endswith("_stderr"):
                label = metric if how == "none" else key
                goal = {True: "higher", False: "lower"}.get(better.get(metric))
                stderr = finite(row.get(f"{metric}_stderr,{how}"))
                metrics[label] = {"value": finite(value), "stderr": stderr, "better": goal}
        if metrics:
            tables[name] = {
                "group": groups.get(name),
                "version": results.get("versions", {}).get(name),
                "n_shot": results.get("n-shot", {}).get(name),
                "questions": (results.get("n-samples", {}).get(name) or {}).get("effective"),
                "main": main_metric(metrics),
                "metrics": metrics,
            }
    return tables


def finite(value):
    """A number, or None for what is none or is not finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def main_metric(metrics):
    """The name of the metric that a table shows of a task: the first that is there of MAIN_METRICS, else of its own."""
    plain = {name.partition(",")[0]: name for name in reversed(metrics)}
    return next((plain[name] for name in MAIN_METRICS if name in plain), next(iter(metrics)))


# ---- as a task of evaluate.py ----------------------------------------------------------------------------------------


class HarnessTask:
    """Tasks of the harness, asked of a checkpoint."""

    title = "Tasks of the evaluation harness"
    panels_of = "what each task is judged by"

    def __init__(self, names, folder=None, n_shot=None, limit=None, seed=1337):
        self.names, self.n_shot, self.limit, self.seed = names, n_shot, limit, seed
        self.manager = task_manager(names, folder)
        self.columns = tuple(names)

    def material(self, run_folder, settings):
        return tokenizer_of(run_folder)

    def check(self, model, tokenizer):
        """Nothing: what the harness asks is known when it asks."""

    def ask(self, model, tokenizer, progress):
        """{task: table} as `tables_of`; {} where the logits are not finite."""
        run = HarnessRun(model, tokenizer, self.seed, progress)
        try:
            tables = tables_of(ask_harness(run, self.names, self.manager, self.n_shot, self.limit))
        except NotFiniteError:  # the harness would count the first answer as the likeliest
            return {}
        self.columns = tuple(f"{name} {table['main']}" for name, table in shown(tables).items())
        return tables

    def record(self, tables):
        version = getattr(harness(), "__version__", None)
        return {"kind": "lm_eval", "harness": version, "limit": self.limit, "seed": self.seed, "tasks": tables}

    def notes(self, tables):
        return [] if tables else ["not scored, for its logits are not finite"]

    def panels(self, tables):
        """{'tasks': {task: number}}, for the figure."""
        return {"tasks": {name: main_value(table)["value"] for name, table in shown(tables).items()}}

    def cells(self, tables):
        return [value_text(main_value(table)) for table in shown(tables).values()] or ["-"] * len(self.columns)

    def heading(self):
        shots = "each task's own number of examples" if self.n_shot is None else f"{self.n_shot} examples"
        some = "all questions" if self.limit is None else f"the first {self.limit} questions, so only a trial"
        return (
            f"EleutherAI's harness on {some}, with {shots}.\n"
            "Each task by one metric, with its standard error over questions; lm_eval_results.csv has them all."
        )

    def write(self, evaluated, folder):
        rows = [
            {**place, "task": name, "metric": metric, **numbers, "n_shot": table["n_shot"],
             "questions": table["questions"], "version": table["version"]}
            for place, tables in evaluated for name, table in tables.items()
            for metric, numbers in table["metrics"].items()
        ]  # fmt: skip
        return write_tables({"lm_eval_results.csv": rows}, folder) if rows else []


def shown(tables):
    """The tasks that a table has a column for: a group stands for its tasks."""
    return {name: table for name, table in tables.items() if table["group"] not in tables}


def main_value(table):
    return table["metrics"][table["main"]]


def value_text(numbers):
    """'31.4% ± 0.5%' of a share, '18.20 ± 0.31' of anything else."""
    value, stderr = numbers["value"], numbers["stderr"]
    if value is None:
        return "-"
    is_share = numbers["better"] == "higher" and 0 <= value <= 1
    text = percent if is_share else "{:.2f}".format
    return text(value) + ("" if stderr is None else f" ± {text(stderr)}")
