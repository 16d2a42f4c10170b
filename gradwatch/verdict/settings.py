"""The limits of the verdict itself."""

from __future__ import annotations

import inspect

from pydantic import Field

from gradwatch.settings import Settings


class VerdictSettings(Settings):
    """When signs become an incident, what kind it has, and when it closes.

    ## What it means
    Rules say what is out of the ordinary. The verdict says whether that is a story to tell.

    ## Settings
    * `calm_steps`: steps without a firing alarm after which an incident closes. With auto-clip armed its `hold` stands instead.
    * `far`: how many times beyond its limit a surge speaks for itself; twice as many while the run is young. Elsewhere growth
      opens an incident only beside a loss that suffers.
    * `lasting_steps`: steps after which a loss that is still up is no longer a spike; looked at then, and each time when
      twice as many have passed.
    * `brief_steps`: steps of firing up to which an explosion without a confirming sign was only a spike.
    * `settled`: how many times its typical gradient norm a layer may have, for a loss that jumped to count as settled.
    * `band`: how many times its typical gradient norm a layer may have without being a suspect.

    ## How it is changed
    `gradwatch replay RUN --rule verdict.far=4` judges a run log with other limits.
    """

    calm_steps: int = Field(default=20, ge=1)
    far: float = Field(default=5.0, ge=1)
    lasting_steps: int = Field(default=12, ge=4)
    brief_steps: int = Field(default=3, ge=0)
    settled: float = Field(default=10.0, gt=1)
    band: float = Field(default=4.0, gt=2)

    @classmethod
    def documentation(cls) -> str:
        """The page that `gradwatch explain verdict` prints, in Markdown."""
        summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
        values = "\n".join(f"* `{name}` = {field.default}" for name, field in cls.model_fields.items())
        return f"# The verdict\n\n{summary}\n{rest}\n\n## Defaults\n{values}\n"
