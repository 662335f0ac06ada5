"""What evaluate.py may ask of a checkpoint: prompts, or where its loss comes from. Each knows its files and its table.

A task has `material(run_folder, settings)`, what it needs beside the model; `check(model, material)`, which refuses
what can be refused before weights are read; `ask(model, material, progress)`; and, of what that returned, `record` (for
evals.jsonl), `notes`, `panels` (for the figure), `cells` (for the table) and `write` (the CSV files).
"""

import csv
import json
import math
from dataclasses import asdict

from eval_loss import measure_loss, multiples_for, position_labels
from eval_probes import Probe
from eval_probing import ask_probe, check_can_ask
from eval_prompts import breakdown, check_prompts, run_prompts, totals
from training_corpora import PROBE_REGISTRY
from training_data import load_dataset
from training_tokenizers import TOKENIZER_FILE, load_tokenizer
from user_errors import UserError


def tokenizer_of(run_folder):
    """The tokenizer that a run keeps.

    Raises:
        UserError: it has none.
    """
    if not (run_folder / TOKENIZER_FILE).is_file():
        raise UserError(
            f"it has no {TOKENIZER_FILE}, so its tokens have no text; copy it from a run on the same dataset"
        )
    return load_tokenizer(run_folder)


class PromptTask:
    """Short questions that the model answers by writing on."""

    title = "Prompts"
    columns = ("score", "passed", "chosen", "nats/byte")
    panels_of = "share of points, or of prompts"

    def __init__(self, prompts, decoding):
        self.prompts, self.decoding = prompts, decoding

    def material(self, run_folder, settings):
        return tokenizer_of(run_folder)

    def check(self, model, tokenizer):
        check_prompts(model, tokenizer, self.prompts.prompts)

    def ask(self, model, tokenizer, progress):
        """[PromptResult] in the order of the file."""
        return run_prompts(model, tokenizer, self.prompts.prompts, self.decoding, progress)

    def record(self, results):
        return {
            "kind": "prompts",
            "prompt_file": {"name": self.prompts.path.name, "sha256": self.prompts.sha256},
            "decoding": asdict(self.decoding),
            **totals(results),
            "categories": breakdown(results, "category"),
            "difficulties": breakdown(results, "difficulty"),
        }

    def notes(self, results):
        """A line for each reason for which prompts could not be asked as they stand."""
        reasons = [result.note for result in results if result.note]
        counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        return [f"{n} of {len(results)} prompts: {reason}" for reason, n in counts.items()]

    def panels(self, results):
        """{panel: {group: number}}, for the figure."""
        return {
            f"by {name}, {how}": {key: numbers[column] for key, numbers in breakdown(results, name).items()}
            for how, column in (("written", "score"), ("chosen", "chosen")) for name in ("category", "difficulty")
        }  # fmt: skip

    def cells(self, results):
        numbers = totals(results)
        interval = f"[{percent(numbers['passed_low'])}, {percent(numbers['passed_high'])}]"
        nats = numbers["answer_nats_per_byte"]
        return [
            percent(numbers["score"]),
            f"{percent(numbers['passed'])} {interval}",
            f"{percent(numbers['chosen'])} ({percent(numbers['chosen_by_chance'])})",
            "-" if nats is None else f"{nats:.3f}",
        ]

    def heading(self):
        prompts, decoding = self.prompts, self.decoding
        how = "greedily" if not decoding.temperature else (
            f"{decoding.num_samples} x at temperature {decoding.temperature:g}, seed {decoding.seed}"
        )  # fmt: skip
        named = f"{prompts.path.as_posix()} (sha256 {prompts.sha256[:12]})"
        return (
            f"{len(prompts.prompts)} prompts of {named}, continued {how}.\n"
            "score: share of the points. passed: share of the prompts, and its 95% interval over prompts.\n"
            "chosen: how often the best answer is likelier per byte than every wrong one (by chance).\n"
            "nats/byte: what the best answer costs."
        )

    def write(self, evaluated, folder):
        """The CSV files, whose names it returns. `evaluated`: [(columns that name a checkpoint, results)]."""
        tables = {
            "eval_results.csv": [{**place, **result_row(each)} for place, results in evaluated for each in results],
            "summary_table.csv": [{**place, **totals(results)} for place, results in evaluated],
        }
        for name in ("category", "difficulty"):
            tables[f"{name}_breakdown.csv"] = [
                {**place, name: key, **numbers}
                for place, results in evaluated for key, numbers in breakdown(results, name).items()
            ]  # fmt: skip
        return write_tables(tables, folder)


FEW_TARGETS = 0.01  # of all, that a group of frequency needs to be drawn; comparison_evals has the same


class LossTask:
    """The validation loss by context length, position, recall and frequency."""

    title = "Loss"
    panels_of = "nats per token"
    columns = ("loss", "2x", "4x", "8x", "seen", "new", "rare")

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens

    def material(self, run_folder, settings):
        """The run's dataset, held to the fingerprint that the run was trained on."""
        dataset = load_dataset(settings.train)
        if dataset.has_outcomes:
            raise UserError(
                f"it was trained on records ({dataset.folder}), which cannot be cut into other "
                "contexts; its own evaluations have its scores: compare_architectures.py shows them"
            )
        record = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(dataset, Probe):
            raise UserError(
                f"it was trained on the probe '{dataset.name}', which has no text to take apart; "
                f"ask it with --probes {dataset.name}"
            )
        if record.get("dataset", {}).get("fingerprint") != dataset.fingerprint:
            raise UserError(f"it was trained on other tokens than {dataset.folder} has; restore those")
        return dataset

    def check(self, model, dataset):
        """Nothing: any causal model can be asked about the text that it was trained on."""

    def ask(self, model, dataset, progress):
        """({(part, group): Tally}, why not all contexts were read)."""
        return measure_loss(model, dataset, self.n_tokens, progress), multiples_for(model, dataset)[1]

    def record(self, results):
        parts = {}
        for (part, group), tally in results[0].items():
            loss = tally.loss if math.isfinite(tally.loss) else None
            parts.setdefault(part, {})[group] = {"loss": loss, "targets": tally.targets}
        return {"kind": "loss", "loss_tokens": self.n_tokens, "parts": parts}

    def panels(self, results):
        """{part: {group: loss}}, for the figure, which frequencies of few targets would set the scale of."""
        parts, enough = self.record(results)["parts"], FEW_TARGETS * results[0]["whole", "all"].targets
        return {
            name: {group: each["loss"] for group, each in parts[name].items()
                   if name != "frequency" or each["targets"] >= enough}
            for name in parts if name != "whole"
        }  # fmt: skip

    def notes(self, results):
        cut = [f"longer contexts were left out: {results[1]}"] if results[1] else []
        return cut if math.isfinite(results[0]["whole", "all"].loss) else [*cut, "its loss is not finite"]

    def cells(self, results):
        groups, _ = results
        wanted = [("whole", "all"), *(("context", f"{k}x") for k in (2, 4, 8)), ("recall", "seen"), ("recall", "new")]
        rare = [key for key in groups if key[0] == "frequency"][-1]
        return [f"{groups[key].loss:.4f}" if key in groups else "-" for key in [*wanted, rare]]

    def heading(self):
        return (
            f"Nats per token over about {self.n_tokens:,} validation tokens.\n"
            "loss: at the training context. 2x, 4x, 8x: of the same targets with that many times the context.\n"
            "seen, new: targets that stood after the same token earlier in the window, and the others.\n"
            "rare: the targets whose tokens are rarest in training."
        )

    def write(self, evaluated, folder):
        rows = [
            {**place, "part": part, "group": group, "targets": tally.targets, "loss": tally.loss,
             "bits_per_byte": tally.bits_per_byte}
            for place, (groups, _) in evaluated for (part, group), tally in groups.items()
        ]  # fmt: skip
        return write_tables({"loss_breakdown.csv": rows}, folder)


class ProbeTask:
    """Small tasks with a known answer, asked of runs that were trained on them, or zero-shot of any."""

    title = "Probes"
    panels_of = "share of answers that are right"

    def __init__(self, probes, n_examples):
        self.probes, self.n_examples = probes, n_examples
        self.columns = tuple(f"{asked.text} ({percent(asked.probe.chance)})" for asked in probes)

    def material(self, run_folder, settings):
        """(tokens that the run knows, the probe that it was trained on or None)."""
        record = json.loads((run_folder / "config.json").read_text(encoding="utf-8")).get("dataset", {})
        own = load_dataset(settings.train) if settings.train.dataset in PROBE_REGISTRY else None
        return record.get("vocab_size") or settings.model.vocab_size, own

    def check(self, model, material):
        for asked in self.probes:
            check_can_ask(model, asked, *material)

    def ask(self, model, material, progress):
        """[ProbeResult] in the order of the command line."""
        results = []
        for asked in self.probes:
            results.append(ask_probe(model, asked, self.n_examples, *material))
            progress(len(results) / len(self.probes))
        return results

    def record(self, results):
        return {"kind": "probes", "examples": self.n_examples, "probes": [numbers_of(result) for result in results]}

    def notes(self, results):
        return []

    def panels(self, results):
        """{'answers': {probe: accuracy}, probe: {places: accuracy}}, for the figure."""
        panels = {"all answers": {result.asked.text: result.accuracy for result in results}}
        for result in results:
            panels[f"{result.asked.text}, by place"] = {name: right / n for name, n, right in by_place(result)}
        return panels

    def cells(self, results):
        return [f"{percent(result.accuracy)}{' zero-shot' if result.is_zero_shot else ''}" for result in results]

    def heading(self):
        return (
            f"Share of answers that are right over {self.n_examples:,} examples of each probe (by chance).\n"
            "zero-shot: of a run that was not trained on the probe, whose symbols are random tokens of its own."
        )

    def write(self, evaluated, folder):
        whole = [{**place, **numbers_of(result)} for place, results in evaluated for result in results]
        places = [
            {**place, "probe": result.asked.text, "places": name, "answers": n, "accuracy": right / n}
            for place, results in evaluated for result in results for name, n, right in by_place(result)
        ]  # fmt: skip
        return write_tables({"probes.csv": whole, "probe_places.csv": places}, folder)


def numbers_of(result):
    """{column: value} of a ProbeResult."""
    return {
        "probe": result.asked.text,
        "block_size": result.block_size,
        "zero_shot": result.is_zero_shot,
        "accuracy": float(result.accuracy),
        "chance": result.asked.probe.chance,
        "answers": int(result.answers.sum()),
    }


def by_place(result):
    """[(places, answers that were due there, those that were right)]: 1, 2-3, 4-7, ... in the window."""
    labels = position_labels(result.block_size)
    groups = [(name, labels == name) for name in dict.fromkeys(labels.tolist())]
    sums = [(name, int(result.answers[chosen].sum()), int(result.correct[chosen].sum())) for name, chosen in groups]
    return [group for group in sums if group[1]]


def percent(share):
    return "-" if share is None else f"{100 * share:.1f}%"


def result_row(result):
    prompt = result.prompt
    return {
        "id": prompt.id,
        "category": prompt.category,
        "difficulty": prompt.difficulty,
        "match": prompt.match,
        "prompt": prompt.prompt,
        "answers": json.dumps(prompt.answers, ensure_ascii=False),
        "written": result.written[0] if len(result.written) == 1 else json.dumps(result.written, ensure_ascii=False),
        "passed": result.passed,
        "points": result.points,
        "max_points": prompt.score,
        "is_chosen": None if result.is_chosen is None else int(result.is_chosen),
        "log_probability_per_byte": json.dumps(result.nats_per_byte, ensure_ascii=False),
        "note": result.note,
    }


def write_tables(tables, folder):
    for name, rows in tables.items():
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return list(tables)
