"""Where a module is tested that has no test file of its own name, and why there."""

from __future__ import annotations

# a module, or a folder with a slash at its end: the test files, and why there
WHERE: dict[str, tuple[tuple[str, ...], str]] = {
    "__init__": (
        ("test_architecture", "test_readme"),
        "it only hands out names, compared with design and page",
    ),
    "__main__": (("test_command_line",), "run as a user runs it, in a process of its own"),
    "errors": (("test_attach", "test_first_use"), "each error is tested where it is raised, with its text"),
    "pipeline": (
        ("test_incidents", "test_any_series", "test_quiet"),
        "it is the flow: tested by what goes in and comes out",
    ),
    "printable": (("test_foreign_text",), "named after what it is there for"),
    "records": (("test_incidents", "test_reports"), "plain data, tested by who fills it and who shows it"),
    "autoclip/": (
        ("test_autoclip",),
        "its parts act only together: one run is played and each part's figure looked at",
    ),
    "autoclip/effect": (("test_clip_effect",), "the test says of what"),
    "clips/": (("test_clips",), "one contract for all of them, each against torch or a loop of its own"),
    "commands/": (("test_commands", "test_command_line"), "one contract for all: output, exit code, help, errors"),
    "commands/keyboard": (("test_watch",), "keys are pressed in a real terminal"),
    "commands/demo_training": (("test_examples",), "a training that is shown, run as the examples are"),
    "distributed/": (("test_processes", "test_together"), "only several processes show what it does"),
    "history/": (("test_history",), "one object to its readers, in files by what they know"),
    "measure/batch_statistics": (("test_flight_recorder",), "the recorder is its only reader"),
    "measure/": (
        ("test_measure", "test_device"),
        "norms against float64, on the CPU and on what stands in for a device",
    ),
    "measure/wrappers": (("test_training_modes",), "wrappers are made by the modes that use them"),
    "offline/compare": (("test_commands",), "compared as the command does"),
    "page/": (("test_page",), "a page is looked at in a browser, whole"),
    "probe/": (
        ("test_probe", "test_unusual_loops"),
        "what sits on a model is tested by trainings",
    ),
    "probe/attribution": (
        ("test_unusual_loops", "test_random_programs"),
        "whose a backward is shows in programs",
    ),
    "probe/deferred_rows": (("test_device", "test_together"), "rows that come later, alone and with other processes"),
    "probe/device_recorder": (("test_device",), "the same trainings as on the CPU, as on a device"),
    "probe/fast_path": (("test_quiet",), "each training both ways: the short one must leave the same rows"),
    "probe/peers": (("test_processes", "test_together"), "only several processes show what it does"),
    "probe/skipping": (("test_skips",), "a skip is tested by what it leaves behind in optimizer and model"),
    "probe/surge_detector": (("test_device",), "it decides on a device only"),
    "reports/": (("test_reports", "test_terminal"), "one contract for all, and what they draw in a real terminal"),
    "reports/mlflow": (("test_loggers",), "against the real library"),
    "reports/tensorboard": (("test_loggers",), "against the real library"),
    "reports/wandb": (("test_loggers",), "against the real library"),
    "rules/": (
        ("test_rules", "test_cases", "test_rule_trainings"),
        "one contract for all, each rule's own cases, and trainings",
    ),
    "runlog/": (
        ("test_run_log", "test_run_log_failures", "test_run_log_damage"),
        "tested by what another process reads",
    ),
    "runlog/thinning": (("test_run_log_kept",), "which rows stay shows in a long log"),
    "runlog/flight": (("test_flight_recorder",), "the test says what it is"),
    "skipping/": (("test_skips",), "every optimizer class, every way of stepping: nothing may have moved"),
    "verdict/": (("test_incidents", "test_any_series"), "signs go in, a story comes out: tested by stories"),
}
