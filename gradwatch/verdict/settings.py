"""The limits by which the verdict opens, classifies and closes incidents."""

from __future__ import annotations

import inspect

from pydantic import Field

from gradwatch.records import VERDICTS
from gradwatch.settings import Settings


class VerdictSettings(Settings):
    """The limits that decide when signs become an incident, which kind it has, and when it closes.

    ## What it means
    Rules detect what is unusual. The verdict decides whether that is an incident. An incident closes once the run is calm:
    resolved if the loss is back near its level before the first sign, gradients arrive in each layer in which they did, weights
    and buffers are finite, and nothing has been found dead or stalled since an explosion; else over, with damage, until that
    holds. Jumps that the program makes with a period are not measured by the loss before them: it changes its targets or its
    data then.

    ## Settings
    * `calm_steps`: number of steps without a firing alarm after which an incident closes. With auto-clip, its `hold` is used
      instead for an explosion.
    * `apart_steps`: number of steps without a firing alarm after which a sign of another cause is an incident of its own: one of
      NaN or infinity after an explosion of finite numbers, or the other way round.
    * `far`: factor beyond its limit at which a surge opens an incident by itself; doubled during the first 24 rows. Otherwise
      growth opens an incident only if the loss suffers too.
    * `lasting_steps`: number of steps after which a loss that is still high, and that an update may have raised, no longer counts
      as a spike. It is checked then, and each time the number of steps has doubled.
    * `returning_steps`: number of steps after the end of an explosion within which a jump of the loss that an update may have
      caused is its return, and no change of the task.
    * `brief_steps`: number of firing steps up to which an explosion without a confirming sign is closed as a spike.
    * `settled`: largest factor over its typical gradient norm that a layer may have for the loss to count as settled after a
      jump.
    * `band`: largest factor over its typical gradient norm that a layer may have without being a suspect.
    * `back_in_band`: how many times its typical gradient norm a suspect may have to be none any more.
    * `first_steps`: the first steps of a run, in which an explosion is attributed to the initialisation.
    * `moved`: the factor by which the weights of one layer change within one sample only if something modified them.
    * `alone`: how many times as much as any other layer's they must have changed, in logarithms, to be the suspect.

    ## How to change it
    `gradwatch replay RUN --rule verdict.far=4` judges a run log with other limits.
    """

    calm_steps: int = Field(default=20, ge=1)
    apart_steps: int = Field(default=8, ge=1)
    far: float = Field(default=5.0, ge=1)
    lasting_steps: int = Field(default=12, ge=4)
    returning_steps: int = Field(default=100, ge=0)
    brief_steps: int = Field(default=3, ge=0)
    settled: float = Field(default=10.0, gt=1)
    band: float = Field(default=4.0, gt=2)
    back_in_band: float = Field(default=2.0, ge=1)
    first_steps: int = Field(default=12, ge=0)
    moved: float = Field(default=1.5, gt=1)
    alone: float = Field(default=4.0, ge=1)

    @classmethod
    def documentation(cls) -> str:
        """Return the page of the verdict in Markdown, as printed by ``gradwatch explain verdict``."""
        summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
        values = "\n".join(f"* `{name}` = {field.default}" for name, field in cls.model_fields.items())
        words = "\n".join(f"* **{word}**: {meaning}." for word, meaning in VERDICTS.items())
        return f"# The verdict\n\n{summary}\n{rest}\n\n## The words\n{words}\n\n## Defaults\n{values}\n"
