"""Run folders as train.py writes them, made up for tests of the comparison."""

import copy
import json

CONFIG = {
    "format": 1,
    "run_name": "run",
    "architecture": "2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm",
    "model_config": {
        "arch_preset": "llama", "model_size": None, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64,
        "vocab_size": 256, "normalization": "rmsnorm", "activation": "silu", "position_encoding": "rope",
        "attention_backend": "sdpa", "norm_position": "pre", "ffn_type": "swiglu", "bias": False,
        "weight_tying": True, "dropout": 0.0, "block_pattern": "attention", "part_options": {"rope_theta": 10000.0},
    },
    "initial_weights": None,
    "training_config": {
        "run_name": "run", "seed": 1337, "dataset": "python_stdlib", "objective": "causal_lm", "batch_size": 12,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "dtype": "auto", "compile": "auto",
        "device": "auto", "max_iters": 100, "log_interval": 10, "part_options": {},
    },
    "resolved": {
        "device": "cpu", "device_name": "a processor", "dtype": "float32", "compile": False, "world_size": 1,
        "tf32": False, "threads": 2, "peak_flops_per_second": 1e11,
        "kernels": {"attention": "sdpa"}, "max_iters": 100, "tokens_per_step": 768,
    },
    "state": {"bytes_per_sequence": 32_768, "context": 64},
    "parameters": {"total": 1_000_000, "active": 1_000_000, "groups": {"embedding": 8192}},
    "flops": {"per_token_forward": 2e6, "per_token_training": 6e6, "convention": "no causal half", "parts": {}},
    "dataset": {
        "name": "python_stdlib", "fingerprint": "aaaa1111bbbb2222", "tokenizer": "byte", "vocab_size": 256,
        "train_tokens": 1_000_000, "val_tokens": 100_000, "evaluation_hash": "eeee1111",
    },
    "versions": {"python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "nanoarch": "0.1"},
    "git": {"commit": "c0ffee00c0ffee00", "dirty": False},
    "command": "python train.py",
    "created": "2026-01-01T00:00:00+00:00",
}  # fmt: skip

SUMMARY = {
    "format": 1, "final_val_loss": 2.0, "best_val_loss": 1.9, "best_step": 90, "bits_per_byte": 2.885,
    "tokens_processed": 76_800, "tokens_supervised": 76_800, "stream_hash": "5eed1337", "train_seconds": 36.0,
    "eval_seconds": 4.0, "tokens_per_second": 2133.0, "mfu": 0.25, "peak_memory_bytes": 512 * 2**20,
    "n_params": 1_000_000, "n_active_params": 1_000_000, "flops_per_token": 6e6, "total_flops": 4.6e11,
    "non_finite_steps": 0, "steps": 100, "status": "finished",
}  # fmt: skip


def make_run(runs_dir, name, summary=(), metrics=True, **changes):
    """Write runs_dir/name and return it.

    Args:
        summary: changes to summary.json; None leaves the file out.
        metrics: True writes metrics.jsonl; a list writes these rows.
        changes: to config.json, a nested field by its path: training_config__seed=1, or seed=1 for short.
    """
    folder = runs_dir / name
    folder.mkdir(parents=True)
    config = copy.deepcopy(CONFIG) | {"run_name": name}
    config["training_config"]["run_name"] = name
    for path, value in changes.items():
        set_field(config, path, value)
    write_json(folder / "config.json", config)
    seed = config["training_config"].get("seed")
    final = SUMMARY | {"stream_hash": f"5eed{seed}"} | dict(summary or {})
    if summary is not None:
        write_json(folder / "summary.json", final)
    if metrics:
        rows = metrics_rows(final) if metrics is True else metrics
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def set_field(config, path, value):
    """set_field(config, 'dataset__name', 'x'); a name without a section is looked up in the two settings sections."""
    *sections, name = path.split("__")
    if not sections and name not in config:
        sections = ["model_config" if name in config["model_config"] else "training_config"]
    for section in sections:
        config = config[section]
    config[name] = value


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def metrics_rows(summary, points=10):
    """A loss that falls from 5 to the final one along 1/step, as train and eval rows."""
    rows = []
    for index in range(points + 1):
        part = index / points
        loss = None
        if summary["final_val_loss"] is not None:
            loss = summary["final_val_loss"] + (5 - summary["final_val_loss"]) * (1 - part) / (1 + 9 * part)
        shared = {
            "step": round(part * summary["steps"]),
            "tokens_processed": round(part * summary["tokens_processed"]),
            "train_seconds": part * summary["train_seconds"],
        }
        rows.append({"kind": "train", "loss": loss, "tokens_per_second": 2133.0, "mfu": 0.25, **shared})
        rows.append({"kind": "eval", "val_loss": loss, "bits_per_byte": loss and loss * 1.4427, **shared})
    return rows


def rows_of(points, **more):
    """Evaluation rows through (tokens, loss), one hour for each thousand tokens."""
    return [
        {
            "kind": "eval",
            "step": index,
            "tokens_processed": tokens,
            "val_loss": loss,
            "train_seconds": tokens * 3.6,
            **more,
        }
        for index, (tokens, loss) in enumerate(points)
    ]
