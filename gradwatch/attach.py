"""`attach`: checks its arguments, converts names to instances, and starts a monitor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from gradwatch.autoclip.policy import AutoClip
from gradwatch.cells import is_interactive, running_cell
from gradwatch.clips import CLIPS, Clip
from gradwatch.device import unreadable
from gradwatch.distributed.find import is_first
from gradwatch.errors import RunLogError, UsageError, did_you_mean, shown
from gradwatch.measure.deepspeed import OFFLOADED, is_deepspeeds, zero_of
from gradwatch.measure.layers import Layers
from gradwatch.measure.wrappers import is_dtensor, is_fully_sharded, unmeasurable
from gradwatch.monitor import Monitor, attached, monitor_of
from gradwatch.probe import Budget
from gradwatch.records import Kind, Sign
from gradwatch.reports import REPORTS, Report, report_by_name
from gradwatch.rules import Rule, default_rules

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.forensics import Mode


def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    rules: Sequence[Rule] | None = None,
    clip: str | Clip | AutoClip | None = None,
    report: str | Report | Sequence[Report | str] | None = "auto",
    log: str | os.PathLike[str] | None = None,
    every: int = 1,
    strict: bool = False,  # noqa: FBT001, FBT002  the public surface
    *,
    budget: float | None = None,
    forensics: bool | str = "auto",
    save_batch: bool = False,
    name: str | None = None,
) -> Monitor:
    """Watch ``model``: from now on, optimizer steps are measured, judged and reported.

    Args:
        model: a module with at least one trainable parameter. A container made for this call alone will do, such as
            ``nn.ModuleList([encoder, decoder])``: what is in it is watched as long as it exists, parameters of a list of their
            own until `Monitor.detach`.
        optimizer: the optimizer. It is found automatically at its first step; pass it to have it checked now.
        scaler: the gradient scaler. It is found automatically when it steps.
        rules: the rules to judge with; None for the default set (`gradwatch.default_rules`).
        clip: None only watches. The name of a clip, such as ``"norm"``, switches auto-clip on with its defaults; a `Clip`
            with the bounds of that clip, an `AutoClip` with that policy.
        report: ``"auto"`` (live in a terminal, a card in a notebook, log lines elsewhere), the name of a report such as
            ``"live"`` or ``"log"``, a `Report`, a list of these, or None for no report.
        log: the folder of a run log, such as ``"runs/today"``, which `gradwatch watch`, `report` and `replay` read. A resumed
            run continues in the same folder. None keeps only the last rows, in memory.
        every: number of optimizer steps between measurements. While an explosion is open, each step is measured. In between,
            once the run has 64 rows, the gradient of one layer and the loss are checked, and the step is measured if they
            leave their bounds; on a device, and with several processes, there is no such check.
        strict: whether errors inside gradwatch are raised. Otherwise each is reported once and training goes on.
        budget: the share of the training time that measuring may take, such as 0.01; ``every`` is then chosen, and adjusted
            as the run goes on. The first 64 steps are all measured, and steps between measurements cost something too
            (``docs/performance.md``), which is more than its share if they are short.
        forensics: whether to find the operation that made the first NaN or infinity, by repeating the forward of the step that
            failed. For that, references to the inputs of a step are kept until it is over. ``"auto"`` does so on the CPU where
            a step takes longer than a millisecond, and with a budget where it takes at most half of that; True and False always
            or never. The code of a loss is computed again from its source, without calling a function of the program;
            ``"lines"`` may run its statements again where that is not possible. ``"wait"`` waits at each step for the loss if it
            is on a device. At most three times in a run is something repeated.
        save_batch: whether to write the inputs of the step that failed into the folder of the run log, which
            `gradwatch reproduce` loads. Of several processes, the first writes its own. They may be large, and they are the
            user's data.
        name: name of the model in all reports and in the run log, such as ``"generator"``, where several models are trained.

    Returns:
        The monitor. It need not be kept: it lives as long as the model, and `gradwatch.monitor_of` returns it. If the model is
        watched already, the old monitor is detached, which the new one notes. So are monitors of the same ``name`` that the same
        cell of a notebook attached when it was run before.

    Raises:
        UsageError: an argument is invalid. Nothing is left attached, and a monitor that was there before goes on.
        RunLogError: the log is damaged, of another program or model, or written by another process.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"attach() got {shown(model)} as model; expected a torch.nn.Module. Pass the module whose parameters you train."
        )
    reason = unmeasurable(model, optimizer)
    if reason is not None:
        raise UsageError(f"This {type(model).__name__} cannot be watched: {reason}. gradwatch does not look there yet.")
    reason = next(filter(None, map(unreadable, {parameter.device for parameter in model.parameters()})), None)
    if reason is not None:
        raise UsageError(
            f"This {type(model).__name__} cannot be watched: {reason}. Train it on the CPU, CUDA, MPS or XPU."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UsageError(f"attach() got every={every!r}; expected a whole number of at least 1 (optimizer steps).")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise UsageError(
            f"attach() got {shown(scaler)} as scaler; expected a torch.amp.GradScaler, or None to find it."
        )
    if budget is not None and not (_is_number(budget) and 0 < budget < 1):
        raise UsageError(f"attach() got budget={budget!r}; expected a share between 0 and 1, such as 0.01.")
    if budget is not None and every > 1:
        raise UsageError(
            f"attach() got every={every} together with budget={budget}: a budget chooses every; leave one out."
        )
    policy = _policy(clip)
    if policy is not None and (every > 1 or budget is not None):
        given = f"every={every}" if budget is None else f"budget={budget}"
        raise UsageError(
            f"attach() got {given} together with clip={shown(clip)}: auto-clip decides about each step, so each has "
            "to be measured. Leave out one of the two."
        )
    if not isinstance(strict, bool):
        raise UsageError(f"attach() got strict={shown(strict)}; expected True or False.")
    mode, called = _mode(forensics, log, save_batch=save_batch), _name(name)
    folder = _folder(log)
    before = monitor_of(model) or _of_a_cell_run_again(folder, model)
    if policy is not None:
        _check_others(policy, model, [before, *_of_earlier_runs_of_this_cell(called)])
    pace = every if budget is None else Budget(budget)
    monitor = Monitor(
        model,
        _rules(rules),
        policy,
        _reports(report),
        scaler=scaler,
        every=pace,
        strict=strict,
        forensics=mode,
        name=called,
    )
    if optimizer is not None and not is_deepspeeds(optimizer):
        _check_optimizer(optimizer, monitor, model)
    if policy is not None:
        _check_clip(policy.clip, monitor, model)
    _replace(before, monitor, model, folder)
    monitor.keep_batches(folder if save_batch and is_first() else None)
    # one of DeepSpeed's own is found from the model
    monitor.start(None if is_deepspeeds(optimizer) else optimizer)
    return monitor


def _of_a_cell_run_again(folder: Path | None, model: nn.Module) -> Monitor | None:
    """Return the monitor that a cell of a notebook, run before, attached to another model with the same layers and log.

    The notebook may still hold that model, for example in a traceback. None outside notebooks and prompts.
    """
    if folder is None or not is_interactive():
        return None
    names = tuple(Layers(model).names)
    found = (one for one in list(attached.values()) if one.writes(folder) and one.history.layers == names)
    return next(found, None)


def _of_earlier_runs_of_this_cell(name: str) -> list[Monitor]:
    """Return the monitors of this name that the cell of a notebook attached when it was run before.

    Their models may live on, for example in a traceback or in a circle of references, but the cell has made new ones.
    """
    cell = running_cell()
    return [
        one
        for one in list(attached.values())
        if cell is not None
        and one.cell is not None
        and (one.cell.key, one.history.facts.name) == (cell.key, name)
        and one.cell.run != cell.run
    ]


def _replace(before: Monitor | None, monitor: Monitor, model: nn.Module, folder: Path | None) -> None:
    """Open the run log and end the monitor ``before``, which goes on if the log is refused."""
    if not is_first():  # only one of the processes that train together writes
        folder = None
    same = before is not None and folder is not None and before.writes(folder)
    if folder is not None and not same:
        monitor.record(folder)
    if before is not None:
        if same:
            _check_same_log(before, monitor, folder)
        monitor.note(before.replaced(model))
    for one in _of_earlier_runs_of_this_cell(monitor.history.facts.name):
        monitor.note(one.replaced(model))
    if folder is not None and same:
        monitor.record(folder)


def _check_same_log(before: Monitor, monitor: Monitor, folder: Path | None) -> None:
    pairs = zip(before.history.layers, monitor.history.layers, strict=False)
    for index, (then, now) in enumerate(pairs):
        if then != now:
            raise RunLogError(
                f"The run log {folder} has {then!r} as layer {index}, the model has {now!r} there now. "
                "Give this run its own path."
            )


def _check_others(policy: AutoClip, model: nn.Module, ending: list[Monitor | None]) -> None:
    """Raise `UsageError` if auto-clip of a monitor that is not ``ending`` acts on parameters of the model already."""
    for other in list(attached.values()):
        if other not in ending and other.clips_any(model):
            raise UsageError(
                f"attach() got clip={policy.clip}, but auto-clip of {other!r} acts on parameters of this "
                f"{type(model).__name__} already. Leave out clip here, or call that monitor's detach() first."
            )


def _folder(log: Any) -> Path | None:
    if log is None:
        return None
    if not isinstance(log, (str, os.PathLike)) or not str(log):
        raise UsageError(
            f'attach() got log={shown(log)}; expected the path of a folder, such as "runs/today", or None.'
        )
    try:
        folder = Path(log)
        folder.resolve()
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # a NUL, bytes, links that lead in a circle
        raise RunLogError(
            f"attach() got log={repr(log)[:300]}, where no folder can be: {error}. Expected the path of a folder, such as "
            '"runs/today". Give another path.'
        ) from error
    return folder


def _mode(forensics: Any, log: Any, *, save_batch: Any) -> Mode | None:
    modes: dict[Any, Mode | None] = {"auto": "auto", "lines": "lines", "wait": "wait", True: "on", False: None}
    if not isinstance(forensics, (bool, str)) or forensics not in modes:
        raise UsageError(f'attach() got forensics={shown(forensics)}; expected "auto", True, False, "lines" or "wait".')
    if not isinstance(save_batch, bool) or (save_batch and (log is None or forensics is False)):
        raise UsageError(
            f"attach() got save_batch={shown(save_batch)} with log={shown(log)} and forensics={shown(forensics)}; expected "
            "True or False, and for True a log and forensics."
        )
    return modes[forensics]


def _name(name: Any) -> str:
    if name is None:
        return ""
    if not isinstance(name, str) or not name.strip():
        raise UsageError(
            f'attach() got name={shown(name)}; expected a name for the model, such as "generator", or None.'
        )
    return name.strip()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _rules(rules: Sequence[Rule] | None) -> list[Rule]:
    if rules is None:
        return default_rules()
    if isinstance(rules, (str, bytes)) or not isinstance(rules, Sequence):
        raise UsageError(
            f"attach() got rules={shown(rules)}; expected a list of Rule instances, or None for the default set."
        )
    for rule in rules:
        if isinstance(rule, type) and issubclass(rule, Rule):
            raise UsageError(
                f"attach() got the class {rule.__name__} among rules; expected an instance: {rule.__name__}()."
            )
        if not isinstance(rule, Rule):
            raise UsageError(
                f"attach() got {shown(rule)} among rules; expected instances of gradwatch.Rule, "
                "such as gradwatch.rules.LossJump(limit=20)."
            )
    for rule in rules:
        _check_form(rule)
    codes = [rule.code for rule in rules]
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice:
        raise UsageError(f"attach() got {' and '.join(twice)} more than once among rules; each code may occur once.")
    return list(rules)


def _check_form(rule: Rule) -> None:
    for name, allowed in (("code", None), ("name", None), ("sign", get_args(Sign)), ("kind", get_args(Kind))):
        value = getattr(rule, name, None)
        if not isinstance(value, str) or (allowed is not None and value not in allowed):
            expected = "text" if allowed is None else "one of " + ", ".join(map(repr, allowed))
            raise UsageError(
                f"The rule {type(rule).__name__} has {name}={value!r}; expected {expected}, set on its class."
            )


def _policy(clip: Any) -> AutoClip | None:
    if clip is None or isinstance(clip, AutoClip):
        return clip
    if isinstance(clip, (str, Clip)):
        return AutoClip(clip)
    raise UsageError(
        f"attach() got clip={shown(clip)}; expected None, {', '.join(map(repr, CLIPS))}, "
        "a clip such as gradwatch.ClipNorm(max_norm=1.0), or an AutoClip."
    )


def _reports(report: Any) -> list[Report]:
    if report is None:
        return []
    asked = report if isinstance(report, (list, tuple)) else [report]
    for one in asked:  # check all of them before the first is made, since loggers open files
        if isinstance(one, str) and one not in (*REPORTS, "auto"):
            raise UsageError(f"There is no report {one!r}.{did_you_mean(one, (*REPORTS, 'auto'))}")
        if not isinstance(one, (str, Report)):
            raise UsageError(
                f"attach() got {shown(one)} as report; expected 'auto', {', '.join(map(repr, REPORTS))}, None, "
                "or an instance of gradwatch.Report."
            )
    # only one of the processes that train together makes the reports that were given by name
    return [
        report_by_name(one) if isinstance(one, str) else one for one in asked if is_first() or not isinstance(one, str)
    ]


def _check_optimizer(optimizer: Any, monitor: Monitor, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"attach() got {shown(optimizer)} as optimizer; expected a torch.optim.Optimizer.")
    if not monitor.owns_any(optimizer):
        raise UsageError(
            f"The {type(optimizer).__name__} owns none of the {len(monitor.history.layers)} parameters of this "
            f"{type(model).__name__}. Build the optimizer from model.parameters() after the model is final."
        )


def _check_clip(clip: Clip, monitor: Monitor, model: nn.Module) -> None:
    clip.check(monitor.history.layers)
    zero = zero_of(model)
    if zero is not None and zero.offloads:
        raise UsageError(f"attach() got clip={clip}, but {OFFLOADED}. Leave out clip here, or offload_optimizer there.")
    if clip.needs_whole_layers and (is_fully_sharded(model) or any(is_dtensor(p) for p in model.parameters())):
        raise UsageError(
            f"{clip} needs whole layers, and each process holds parts of those of this {type(model).__name__}. "
            "Clip by global norm instead, such as clip='norm' or clip='zscore'."
        )
