"""What config.json and a checkpoint's metadata.json say of a run: model, data, code, versions, earlier sessions."""

import json
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from model_flops import active_parameters, parameters_by_group, state_bytes

FORMAT = 1  # of config.json and summary.json


def versions():
    import numpy

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def git_state():
    """{'commit', 'dirty'} of the code, or None for both where it is not a git checkout."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              encoding="utf-8", timeout=10, check=True).stdout.strip()  # fmt: skip

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def config_record(settings, run_name, model, flops, dataset, validation, resolved, arguments):
    """config.json: the whole story of a run."""
    return {
        "format": FORMAT,
        "run_name": run_name,
        "architecture": model.config.architecture_name(),
        "model_config": settings.model.to_dict(),
        "training_config": settings.train.to_dict(),
        "resolved": resolved,
        "parameters": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "active": active_parameters(model),
            "groups": parameters_by_group(model),
        },
        "flops": flops.to_dict(),
        "state": {
            "bytes_per_sequence": state_bytes(model, model.config.block_size) if model.config.causal else None,
            "context": model.config.block_size,
        },
        "dataset": {
            "name": dataset.name, "fingerprint": dataset.fingerprint, "tokenizer": dataset.tokenizer_name,
            "vocab_size": dataset.vocab_size, "train_tokens": len(dataset.train), "val_tokens": len(dataset.val),
            "evaluation_hash": validation.hash, **dataset.facts(),
        },
        "versions": versions(),
        "git": git_state(),
        "command": shlex.join(["python", "train.py", *arguments]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def earlier_sessions(folder):
    """{'earlier_sessions': how and where the run was trained before it was resumed}, {} for a new run.

    Where its first weights came from is told again: the session that goes on does not know.
    """
    if not (folder / "config.json").exists():
        return {}
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    session = {name: before[name] for name in ("created", "command", "git", "versions", "resolved")}
    session["training_config"] = before.get("training_config")
    sessions = [*before.get("earlier_sessions", []), session]
    return {"earlier_sessions": sessions, "initial_weights": before.get("initial_weights")}


def metadata_record(settings, run_name, ledger, stream, scheduled_tokens=None):
    """metadata.json of a checkpoint at the ledger's step.

    Args:
        scheduled_tokens: the count that this checkpoint was due at, which its step is the first to reach; None where
            no schedule asked for it.
    """
    return {
        "experiment_name": run_name,
        "global_step": ledger.step,
        "stream_hash": ledger.stream_hash,
        "epoch": stream.epoch(ledger.step),
        "token_metrics": {
            "total_tokens_processed": ledger.tokens_processed,
            "total_tokens_supervised": ledger.tokens_supervised,
            "tokens_per_step": ledger.tokens_per_step,
            "effective_batch_size": stream.sequences_per_step,
            "sequence_length": stream.block_size,
            "estimated_tokens_at_step": scheduled_tokens or ledger.step * ledger.tokens_per_step,
        },
        "training_config": settings.train.to_dict(),
        "model_config": settings.model.to_dict(),
    }
