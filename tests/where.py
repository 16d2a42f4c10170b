"""The test files of modules that have no test file of their own name, each with the reason."""

from __future__ import annotations

# by module, or by folder with a trailing slash: the test files and the reason
WHERE: dict[str, tuple[tuple[str, ...], str]] = {
    "__init__": (
        ("test_architecture", "test_readme"),
        "the package only exports names, which are compared with the documentation",
    ),
    "__main__": (("test_command_line",), "it is run as by a user, in a separate process"),
    "errors": (("test_attach", "test_first_use"), "each error is tested with its message where it is raised"),
    "offline/policy": (("test_commands",), "the commands `compare` and `replay` are its only users"),
    "offline/settings": (("test_commands",), "the command `compare` is its only user"),
    "pipeline": (
        ("test_incidents", "test_any_series", "test_quiet"),
        "it connects all parts and is tested by its inputs and outputs",
    ),
    "settings": (("test_attach",), "its messages are those of the settings that a user passes"),
    "text/printable": (("test_foreign_text",), "the test is named after the purpose of the module"),
    "records/": (("test_incidents", "test_reports"), "plain data, tested where it is created and displayed"),
    "autoclip/": (
        ("test_autoclip",),
        "its parts only act together, so one run is simulated and the result of each part is checked",
    ),
    "autoclip/effect": (("test_clip_effect",), "the test is named after the effect of a clip"),
    "clips/": (("test_clips",), "one contract for all clips, each compared with torch or a simple loop"),
    "commands/": (
        ("test_commands", "test_command_line"),
        "one contract for all commands: output, exit code, help, errors",
    ),
    "commands/keyboard": (("test_watch",), "the keys are typed in a real terminal"),
    "commands/demo_training": (("test_examples",), "it is an example training and is run like the other examples"),
    "cells": (("test_notebook",), "which cell is running is known only in a real kernel"),
    "distributed/": (("test_processes", "test_together"), "it needs several processes"),
    "commands/blame": (("test_forensics",), "its findings are those of the forensics"),
    "commands/reproduce": (("test_forensics_monitor",), "it loads what a monitor has kept"),
    "forensics/": (
        (
            "test_forensics",
            "test_forensics_monitor",
            "test_forensics_processes",
            "test_forensics_random",
            "test_forensic_advice",
            "test_armed_steps",
            "test_graph_of_loss",
            "test_loss_source",
            "test_loss_elsewhere",
            "test_parts_of_models",
            "test_reached",
        ),
        "one contract: what is found in programs that fail",
    ),
    "records/origin": (("test_forensics",), "plain data, tested where it is created"),
    "integrations/session": (
        ("test_huggingface", "test_lightning", "test_accelerate", "test_keras", "test_integrations"),
        "each trainer uses all of it, and is tested with it",
    ),
    "integrations/versions": (
        ("test_integrations",),
        "it is tested with frameworks that are missing, too old or changed",
    ),
    "history/": (("test_history",), "its files form a single object for their readers"),
    "measure/batch_statistics": (("test_flight_recorder",), "the flight recorder is its only user"),
    "measure/": (
        ("test_measure", "test_device"),
        "norms are compared with float64, on the CPU and on a simulated device",
    ),
    "measure/wrappers": (("test_training_modes",), "wrappers are created by the training modes that use them"),
    "offline/compare": (("test_commands",), "it is tested by the command that uses it"),
    "page/": (("test_page",), "the whole page is tested in a browser"),
    "probe/": (
        ("test_probe", "test_unusual_loops"),
        "what is attached to a model is tested by trainings",
    ),
    "probe/attribution": (
        ("test_unusual_loops", "test_random_programs"),
        "which backward belongs to a model depends on the whole program",
    ),
    "probe/deferred_rows": (("test_device", "test_together"), "deferred rows are tested in one process and in several"),
    "probe/device_action": (("test_device",), "what is done at once is tested by the trainings it is done in"),
    "probe/row_writer": (("test_device", "test_together"), "rows are tested by what has arrived of them"),
    "probe/device_recorder": (("test_device",), "the trainings of the CPU are repeated on a simulated device"),
    "probe/fast_path": (
        ("test_quiet",),
        "each training is run with and without the fast path, which must record the same rows",
    ),
    "probe/peers": (("test_processes", "test_together"), "it needs several processes"),
    "probe/skipping": (("test_skips",), "a skip is tested by the state of optimizer and model after it"),
    "reports/": (
        ("test_reports", "test_terminal"),
        "one contract for all reports, and their output in a real terminal",
    ),
    "reports/mlflow": (("test_loggers",), "it is tested with the real library"),
    "reports/outbox": (("test_loggers",), "the report for MLflow is its only user"),
    "reports/scalars": (("test_loggers",), "its numbers are read back with the real libraries"),
    "reports/tensorboard": (("test_loggers",), "it is tested with the real library"),
    "reports/wandb": (("test_loggers",), "it is tested with the real library"),
    "rules/": (
        ("test_rules", "test_cases", "test_rule_trainings"),
        "one contract for all rules, the cases of each rule, and trainings",
    ),
    "runlog/": (
        ("test_run_log", "test_run_log_failures", "test_run_log_damage"),
        "it is tested by what another process reads",
    ),
    "runlog/thinning": (("test_run_log_kept",), "the choice of rows only shows in a long log"),
    "runlog/flight": (("test_flight_recorder",), "the module is the flight recorder"),
    "skipping/": (("test_skips",), "after a skip nothing may have changed, for every optimizer class and kind of step"),
    "verdict/": (("test_incidents", "test_any_series"), "it is tested by the incidents that result from given signs"),
}
