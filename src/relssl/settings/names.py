"""Short names of settings, and the names that other programs have for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from reprlib import repr as show
from typing import Any

from relssl.errors import ConfigError

# A setting, or several that one word sets together, and the words for it.
_WORDS = {
    "data": "data_dir data_path dataset",
    "out": "output_dir output run_dir save_dir",
    "backbone": "model arch",
    "epochs": "max_epochs num_epochs",
    "start_from": "from",
    "accumulate": "accumulate_grad_batches grad_accum_steps gradient_accumulation_steps",
    "views.weak.size views.strong.size": "image_size img_size input_size size",
    "method.memory_size": "memory_size queue_size",
    "optimizer.name": "opt optim",
    "optimizer.lr": "lr learning_rate base_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.momentum": "momentum",
    "optimizer.warmup_epochs": "warmup_epochs",
    "optimizer.clip": "clip_grad grad_clip gradient_clip_val",
    "engine.device": "device accelerator",
    "engine.devices": "devices gpus num_gpus ngpus",
    "engine.nodes": "nodes num_nodes",
    "engine.precision": "precision",
    "engine.threads": "threads",
    "engine.deterministic": "deterministic",
    "loader.workers": "workers num_workers",
    "log.to": "logger loggers",
}
_MEANT = {word: setting.split() for setting, words in _WORDS.items() for word in words.split()}

# The settings of a run that nearly everyone has a use for.
MAIN = (
    *("recipe", "start", "teacher", "backbone", "method.name", "epochs", "max_steps", "time_limit", "batch_size", "accumulate"),
    *("optimizer.lr", "optimizer.weight_decay", "optimizer.warmup_epochs", "views.weak.size", "method.memory_size", "out"),
    *("seed", "engine.device", "engine.devices", "engine.precision", "loader.workers", "log.knn_every", "log.to"),
)

_WEIGHTS = "weights to begin with are given as start (a run, a file or a timm name), those of a frozen teacher as teacher"
_VIEWS = "views are made as the settings below views.weak and views.strong say; views.weak.name may be your own, package.module:function"
_HOOKS = "hooks=[...] of relssl.pretrain in Python takes objects with on_row and others; RUN/metrics.jsonl holds all figures as they come"
_SCHEDULE = "the learning rate rises over optimizer.warmup_epochs and falls to 0 on a cosine"
# Words for what is no setting of a run, and what to do instead.
_ELSEWHERE = {
    "temperature tau": "is two settings, method.teacher_temperature and method.student_temperature",
    "crop_size crop global_crop_size": "views have two sizes, views.weak.size and views.strong.size; image_size sets both",
    "amp fp16 use_amp": "set engine.precision: bf16, fp32 or auto",
    "scheduler sched lr_scheduler min_lr": _SCHEDULE,
    "transform transforms transform_args augmentations": _VIEWS,
    "init weights checkpoint checkpoint_path pretrained pretrained_path pretrained_weights initial_checkpoint": _WEIGHTS,
    "model_args model_kwargs drop_path drop_path_rate drop_rate": "is the network's: backbone_args '{drop_path_rate: 0.1}'",
    "callbacks callback hooks hook": _HOOKS,
    "overwrite": "a run folder is never overwritten; give another out",
}
ELSEWHERE = {word: advice for words, advice in _ELSEWHERE.items() for word in words.split()}


def words(setting: str) -> list[str]:
    """Return the other names of a setting, the best one first."""
    return [word for word, settings in _MEANT.items() if setting in settings]


def meant(name: str, known: Collection[str]) -> list[str]:
    """Return the `known` settings that a name stands for, itself if it is one of them or none is known."""
    if name in known or name not in _MEANT:
        return [name]
    settings = [setting for setting in _MEANT[name] if setting in known]
    return settings or [word for word in words(_MEANT[name][0]) if word in known] or [name]


def spell(given: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Return settings, by dotted names, under their own names among the `known`, by default those of a run.

    Raises:
        ConfigError: if two names give one setting two values.
    """
    known = known or [setting for settings in _MEANT.values() for setting in settings]
    spelled = dict[str, Any]()
    for name, value in given.items():
        for setting in meant(name, known):
            before = spelled.setdefault(setting, value)
            if before is not value and str(before) != str(value):
                values = " and as ".join(" ".join(show(each).split()) for each in (before, value))
                raise ConfigError(f"{setting}: is given twice, as {values} ({name}); give it once")
    return spelled
