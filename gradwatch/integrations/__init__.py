"""Callbacks for trainers: one file for each framework, which is imported only on use, and what they have in common.

* `gradwatch.integrations.huggingface`: Trainer of Hugging Face transformers, and trainers built on it, such as those of TRL.
* `gradwatch.integrations.lightning`: Trainer of Lightning.
* `gradwatch.integrations.accelerate`: training loops with an Accelerator.
* `gradwatch.integrations.keras`: `fit` of Keras 3 on its torch backend.
"""

from __future__ import annotations
